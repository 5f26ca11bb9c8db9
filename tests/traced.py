"""Writes a Llama down for OpenVINO without optimum-intel, so that any suite can run it.

The engine wants one graph with `input_ids`, `attention_mask`, `position_ids` and
`beam_idx`, whose keys and values are states. `make export` asks optimum-intel for it;
here one step of the model is traced, and `make test-slow` compares the real thing.
"""

import shutil
import warnings
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation
from openvino_tokenizers import convert_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils import exported, results
from utils.adapters import weights_fingerprint

COPIED = (
    *("config.json", "generation_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json"),
)


class Past:
    """The keys and values so far, as the model's attention hands them over."""

    def __init__(self, past):
        self.past, self.present = past, []

    def get_seq_length(self, *_):
        return self.past[0].shape[2]

    def update(self, keys, values, layer, *_, **__):
        pair = self.past[2 * layer : 2 * layer + 2]
        both = [torch.cat([old, new], 2) for old, new in zip(pair, (keys, values))]
        self.present += both
        return both


class Step(torch.nn.Module):
    """One forward pass with the keys and values as plain inputs and outputs."""

    def __init__(self, whole):
        super().__init__()
        self.model, self.lm_head = whole.model, whole.lm_head

    def forward(self, input_ids, attention_mask, position_ids, *past):
        cache = Past(past)
        keys = torch.arange(attention_mask.shape[1])
        seen = keys[None, None, None, :] <= position_ids[:, None, :, None]
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=seen,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self.lm_head(hidden), *cache.present


def graph_of(whole) -> ov.Model:
    """The stateful graph of a Transformers Llama."""
    config = whole.config
    heads, width = config.num_key_value_heads, config.head_dim
    count = 2 * config.num_hidden_layers
    past = [torch.zeros(1, heads, 3, width) for _ in range(count)]
    ids, mask = torch.ones(1, 2, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)
    example = (ids, mask, torch.tensor([[3, 4]]), *past)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        graph = ov.convert_model(Step(whole), example_input=example)
    beam = ops.parameter([-1], np.int32, name="beam_idx")
    beam.output(0).set_names({"beam_idx"})
    names = ("input_ids", "attention_mask", "position_ids")
    for place, entry in enumerate(graph.inputs):
        node = entry.get_node()
        if place < len(names):
            entry.set_names({names[place]})
            node.set_partial_shape(ov.PartialShape([-1, -1]))
            continue
        entry.set_names({f"past.{place - len(names)}"})
        node.set_partial_shape(ov.PartialShape([-1, heads, -1, width]))
        readers = list(node.output(0).get_target_inputs())
        chosen = ops.gather(node.output(0), beam, ops.constant(np.int64(0)))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    for place, entry in enumerate(graph.outputs):
        entry.set_names({f"present.{place - 1}" if place else "logits"})
    graph.add_parameters([beam])
    graph.validate_nodes_and_infer_types()
    pairs = {f"past.{n}": f"present.{n}" for n in range(count)}
    apply_make_stateful_transformation(graph, pairs)
    batch = ops.gather(
        ops.shape_of(graph.input("input_ids")),
        ops.constant(np.array([0])),
        ops.constant(np.int64(0)),
    )
    rest = ops.constant(np.array([heads, 0, width]))
    empty = ops.broadcast(ops.constant(np.float32(0)), ops.concat([batch, rest], 0))
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([empty])
    graph.validate_nodes_and_infer_types()
    return graph


def write(base: Path, name: str, folder: Path) -> exported.Export:
    """Write the Llama in `base` to `folder` in float32, as a finished export."""
    folder.mkdir(parents=True)
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    graph = graph_of(whole)
    ov.save_model(graph, folder / "openvino_model.xml", compress_to_fp16=False)
    tokenizer = AutoTokenizer.from_pretrained(base)
    converted = convert_tokenizer(tokenizer, with_detokenizer=True)
    for kind, model in zip(("tokenizer", "detokenizer"), converted):
        ov.save_model(model, folder / f"openvino_{kind}.xml")
    for file in COPIED:
        shutil.copyfile(base / file, folder / file)
    record = {
        "base_model": name,
        "base_fingerprint": weights_fingerprint(base),
        "weight_format": "fp32",
        "files": {file.name: file.stat().st_size for file in folder.iterdir()},
    }
    results.write_json(folder / exported.RECORD, record)
    return exported.read_export(folder)
