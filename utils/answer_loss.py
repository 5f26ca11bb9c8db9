"""The training loss on answer tokens alone, without the logits of a whole batch.

Only positions that carry a label are multiplied with the vocabulary, a chunk at a time,
and each chunk's gradient is worked out while its logits are there: the output layer is
frozen, so the gradient of the hidden states is all that is needed, and nothing is
computed twice. The idea is that of Liger Kernel's fused linear cross-entropy (Hsu et
al. 2024), written out in PyTorch, since a T4 and a CPU have no Triton for it. TRL's own
loss scores the question's and the padding's positions, too, where there is no Triton.
"""

import functools

import torch

from utils.prompts import IGNORED

FLOATS_AT_ONCE = 1 << 26  # of logits: 0.27 GB in float32


class AnswerLoss(torch.autograd.Function):
    """Summed negative log-likelihood of tokens, in nats, from their hidden states."""

    @staticmethod
    def forward(ctx, states, weight, targets):
        """Loss of `states` (n, hidden) under `weight` (vocabulary, hidden).

        Args:
            ctx: keeps the gradient for `backward`.
            states: of the positions that predict `targets`.
            weight: of the output layer, frozen.
            targets: token ids, (n,).

        Returns:
            The sum over the n tokens, a float32 scalar.
        """
        gradient = torch.empty_like(states)
        total = torch.zeros((), device=states.device)
        size = max(1, FLOATS_AT_ONCE // len(weight))
        for start in range(0, len(states), size):
            part, wanted = states[start : start + size], targets[start : start + size]
            logits = (part @ weight.T).float()
            norm = logits.logsumexp(-1, keepdim=True)
            total += (norm - logits.gather(1, wanted[:, None])).sum()
            # Softmax less the one-hot target is the gradient of the logits.
            logits.sub_(norm).exp_()
            logits[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
            gradient[start : start + size] = logits.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream):
        """The gradient that `forward` has kept, times what comes from above."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None


def add_answer_loss(causal) -> None:
    """Let `causal(…, labels=…, answer_loss=True)` return the summed loss of answers.

    Args:
        causal: a Transformers causal language model, without a PEFT wrapper; its other
            calls stay as they are.

    Raises:
        ValueError: the output layer is trained, which this loss does not do.
    """
    if causal.lm_head.weight.requires_grad:
        raise ValueError("the output layer (lm_head) must be frozen; LoRA leaves it so")
    plain = causal.forward

    @functools.wraps(plain)
    def forward(*args, answer_loss: bool = False, labels=None, **kwargs):
        if not answer_loss:
            return plain(*args, labels=labels, **kwargs)
        hidden = causal.model(*args, **kwargs).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        wanted = targets != IGNORED
        weight = causal.lm_head.weight
        if hasattr(weight, "full_tensor"):  # sharded by FSDP
            weight = weight.full_tensor()
        return AnswerLoss.apply(hidden[wanted], weight, targets[wanted])

    causal.forward = forward
