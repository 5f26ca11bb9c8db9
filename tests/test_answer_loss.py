"""The loss on answers alone: the same number and gradient as PyTorch's own."""

import pytest
import torch

from utils import answer_loss
from utils.prompts import IGNORED

IDS = torch.tensor([[7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 25]])
LABELS = torch.tensor(
    [[IGNORED, IGNORED, 9, 10, 11, 12], [IGNORED, IGNORED, IGNORED, 23, 24, IGNORED]]
)


def plain_loss(logits):
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), reduction="sum"
    )


@pytest.mark.parametrize("floats", [1, 1000, 1 << 26])  # one position, two, all at once
def test_it_is_cross_entropy_with_its_gradient(tiny_model, monkeypatch, floats):
    monkeypatch.setattr(answer_loss, "FLOATS_AT_ONCE", floats)
    trained = tiny_model.model.layers[0].mlp.down_proj.weight
    tiny_model.requires_grad_(False)
    trained.requires_grad_(True)
    expected = plain_loss(tiny_model(input_ids=IDS).logits)
    expected.backward()
    gradient, trained.grad = trained.grad, None

    answer_loss.add_answer_loss(tiny_model)
    loss = tiny_model(input_ids=IDS, labels=LABELS, answer_loss=True)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(trained.grad, gradient, rtol=1e-5, atol=1e-7)


def test_a_batch_without_any_answer_is_a_zero_that_can_be_trained_on(tiny_model):
    tiny_model.requires_grad_(False)
    tiny_model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    answer_loss.add_answer_loss(tiny_model)
    none = torch.full_like(LABELS, IGNORED)
    loss = tiny_model(input_ids=IDS, labels=none, answer_loss=True)
    loss.backward()
    assert loss.item() == 0
    assert not tiny_model.model.layers[0].mlp.down_proj.weight.grad.any()


def test_other_calls_stay_as_they_are(tiny_model):
    before = tiny_model(input_ids=IDS, labels=LABELS)
    tiny_model.requires_grad_(False)
    answer_loss.add_answer_loss(tiny_model)
    after = tiny_model(input_ids=IDS, labels=LABELS)
    assert torch.equal(before.logits, after.logits) and before.loss == after.loss


def test_a_trained_output_layer_is_refused(tiny_model):
    with pytest.raises(ValueError, match="must be frozen"):
        answer_loss.add_answer_loss(tiny_model)


def test_half_precision_keeps_the_gradient(tiny_model):
    """A T4 works in float16: the gradient must neither vanish nor overflow there."""
    torch.manual_seed(0)
    weight = tiny_model.lm_head.weight.detach()
    states = torch.randn(40, 64)
    targets = torch.randint(0, 384, (40,))
    gradients = []
    for dtype in (torch.float32, torch.float16):
        given = states.detach().clone().to(dtype).requires_grad_(True)
        loss = answer_loss.AnswerLoss.apply(given, weight.to(dtype), targets)
        (loss * 1024 / 40).backward()  # as a scaled mean
        gradients.append(given.grad.float())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-2)
    assert gradients[0].abs().max() > 1
