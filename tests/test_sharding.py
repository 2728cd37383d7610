"""FSDP2 on two gloo processes: decay of sharded parameters equals that of whole ones, in every mode."""

import pytest

from tests.processes import run_job

JOB = """
import copy, sys, torch
import torch.distributed as dist
import transformers as tf
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
import fnl_hf
from fnl_hf import sharding
from fnl_hf.decay import add_decay_gradients, decay_step, decay_terms, decayed
from fnl_hf.measure import gradient_norms, measurements
from fnl_hf.optim import Lamb
from tests.families import BART, BERT

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
small = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, vocab_size=50, bos_token_id=0, eos_token_id=2)
models = {
    "whole heads": (tf.BertForMaskedLM(tf.BertConfig(**BERT)), 1.0),
    "narrow heads": (tf.BertForMaskedLM(tf.BertConfig(**BERT)), 0.5),
    "cut heads": (tf.BertForMaskedLM(tf.BertConfig(**(BERT | dict(hidden_size=24, num_attention_heads=3)))), 1.0),
    "fused, transposed": (tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)), 1.0),
    "rotary, grouped": (
        tf.LlamaForCausalLM(tf.LlamaConfig(**small, num_attention_heads=4, num_key_value_heads=2)), 1.0
    ),
}
gathered = 0
whole_factor = sharding.DTensor.full_tensor
def counting(self, *args, **kwargs):
    global gathered
    gathered += self.dim() == 2
    return whole_factor(self, *args, **kwargs)

for name, (model, head_rank) in models.items():
    model = fnl_hf.factorize(model.double(), fnl_hf.FNLConfig(head_rank=head_rank))
    for parameter in model.parameters():
        parameter.data.mul_(3)
    ids = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(rank))
    both = torch.cat([torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(r)) for r in (0, 1)])
    for mode in ("coupled", "decoupled", "lamb"):
        reference, sharded = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
        for module in sharded.modules():
            if type(module).__name__ in ("BertLayer", "GPT2Block", "LlamaDecoderLayer"):
                fully_shard(module)
        fully_shard(sharded)
        make = {
            "coupled": lambda ps: torch.optim.SGD(ps, lr=0.05),
            "decoupled": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.0),
            "lamb": lambda ps: Lamb(ps, lr=0.01),
        }[mode]
        for replica, batch in ((reference, both), (sharded, ids)):
            optimizer = make(replica.parameters())
            for _ in range(2):
                replica(input_ids=batch, labels=batch).loss.backward()
                products = decayed(replica)
                if replica is sharded:
                    assert all(map(sharding.is_sharded, products)), name
                    sharding.DTensor.full_tensor = counting
                if mode == "coupled":
                    add_decay_gradients(products, 0.1)
                elif mode == "decoupled":
                    decay_step(products, optimizer, 0.1)
                else:
                    optimizer.frobenius = lambda replica=replica: decay_terms(decayed(replica), 0.1)
                optimizer.step()
                sharding.DTensor.full_tensor = whole_factor
                optimizer.zero_grad()
        got = dict(sharded.named_parameters())
        start = dict(model.named_parameters())
        for key, expected in reference.named_parameters():
            update = expected.detach() - start[key].detach()
            actual = got[key].full_tensor().detach() - start[key].detach()
            tolerance = dict(rtol=1e-6, atol=1e-10) if mode == "coupled" else dict(rtol=1e-4, atol=1e-7)
            assert_close(actual, update, **tolerance, msg=lambda m: f"{name} {mode} {key} {m}")
    whole, shards = (measurements(fnl_hf.factorizations(m)) for m in (reference, sharded))
    for kind in whole:
        for what, value in whole[kind].items():
            assert abs(shards[kind][what] - value) <= 1e-5 * abs(value) + 1e-9, (name, kind, what)
    assert (gathered > 0) == (name == "cut heads"), (name, gathered)
    gathered = 0
    if rank == 0:
        print("proven", name)
"""


@pytest.mark.slow
def test_decay_of_shards_is_that_of_the_whole(tmp_path):
    assert run_job(tmp_path, JOB, 2).stdout.count("proven") == 5
