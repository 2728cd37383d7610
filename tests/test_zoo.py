"""Diverse model types, tiny and random: what is found in them, and round trips through checkpoints in new processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import fnl_hf
from scripts.coverage import build, outputs
from scripts.coverage.survey import survey

ROOT = Path(__file__).parents[1]

# model type -> the kinds of its products; none claimed that a probe refutes
KINDS = {
    "albert": {"qk", "ov"},
    "bert": {"qk", "ov"},
    "bloom": {"qk", "ov"},  # fused, heads interleaved; alibi is added to the scores
    "clip": {"qk", "ov"},
    "codegen": {"rotary-qk", "ov"},  # fused in four parts of [q, v, k], partly rotated, planes interleaved
    "cohere": {"rotary-qk", "ov"},
    "deberta": {"qk", "ov"},  # fused per head, biases of queries and values on the module itself
    "deepseek_v3": {"qk", "ov"},  # latent attention: the unrotated part
    "falcon": {"rotary-qk", "ov"},  # one key and value for all heads, fused
    "gemma": {"rotary-qk", "ov"},
    "gpt2": {"qk", "ov"},
    "gpt_bigcode": {"qk", "ov"},
    "gpt_neox": {"rotary-qk", "ov"},
    "gptj": {"rotary-qk", "ov"},
    "llama": {"rotary-qk", "ov"},
    "marian": {"qk", "ov"},
    "mistral": {"rotary-qk", "ov"},
    "modernbert": {"rotary-qk", "ov"},
    "mpt": {"qk", "ov"},
    "olmo2": {"ov"},  # norms on queries and keys
    "phi3": {"rotary-qk", "ov"},
    "qwen2": {"rotary-qk", "ov"},
    "qwen3": {"ov"},
    "t5": {"qk", "ov"},
    "vit": {"qk", "ov"},
    "wav2vec2": {"qk", "ov"},
    "whisper": {"qk", "ov"},
}

ROUND_TRIPS = [
    *KINDS, "bart", "distilbert", "electra", "m2m_100", "opt", "roberta", "siglip", "starcoder2", "xlm-roberta",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model_type", KINDS)
def test_kinds_found_and_proven(model_type):
    row = survey(model_type)
    assert row["wrong"] == [] and row["missed"] == []
    assert set(row["products"]) == KINDS[model_type]
    assert all(len(reason) > 10 for reason in row["skipped"])


RELOAD = """
import json, sys, torch
from scripts.coverage import outputs
{imports}
from transformers import AutoModel
import transformers
for directory in json.loads(sys.argv[1]):
    cls = getattr(transformers, json.load(open(directory + "/config.json"))["architectures"][0])
    model = cls.from_pretrained(directory, attn_implementation="eager").eval()  # as `build` makes them
    inputs = torch.load(directory + "/inputs.pt", weights_only=False)
    with torch.no_grad():
        torch.manual_seed(0)
        torch.save(outputs(model, inputs), directory + "/{name}.pt")
"""


def reload_all(directories, name, imports):
    code = RELOAD.format(name=name, imports=imports)
    arguments = [sys.executable, "-c", code, json.dumps([str(d) for d in directories])]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_round_trips_in_new_processes(tmp_path):
    reduced, dense, expected = [], [], {}
    for model_type in ROUND_TRIPS:
        model, inputs = build(model_type)
        fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=0.5), verify=inputs)
        expected[model_type] = outputs(model, inputs)
        for kind, directories in (("reduced", reduced), ("dense", dense)):
            directories.append(tmp_path / kind / model_type)
            if kind == "dense":
                fnl_hf.to_dense(model)
            model.save_pretrained(directories[-1])
            torch.save(inputs, directories[-1] / "inputs.pt")
        assert "fnl" not in (dense[-1] / "config.json").read_text()
    reload_all(reduced, "again", "import fnl_hf")
    reload_all(dense, "again", "assert 'fnl_hf' not in sys.modules")
    for model_type, a, b in zip(ROUND_TRIPS, reduced, dense, strict=True):
        for exact, again, plain in zip(
            expected[model_type], *(torch.load(d / "again.pt") for d in (a, b)), strict=True
        ):
            assert torch.equal(again, exact), model_type
            assert_close(plain, exact, rtol=1e-4, atol=1e-5, msg=model_type)
