"""Networks of transformers themselves, where the package is there; test_foreign_networks.py has a look-alike."""

import importlib.util

import pytest
import torch
from methods_helpers import same, snapshot

from fastkd import MultiTeacherKD
from fastkd import functional as F
from fastkd.methods import KD, ORC, RKD
from fastkd.models import with_features

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")


def bert(seed, layers=1):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, max_position_embeddings=8, **sizes))


def encoded(rows=6):
    from transformers import BatchEncoding

    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, 5, dtype=torch.long)
    mask[::2, 3:] = 0
    ids = torch.randint(20, (rows, 5), generator=generator)
    return BatchEncoding({"input_ids": ids, "attention_mask": mask}), torch.randint(3, (rows,), generator=generator)


def test_a_batch_encoding_goes_in_as_keywords():
    inputs, target = encoded()
    method = KD(bert(1), bert(2, layers=2)).eval()
    z, t = (network(**inputs).logits for network in (method.student, method.guides[0]))
    expected = F.multi_teacher_kd(z, [t], target, weights=[0.9], ce_weight=1 - 0.9)
    torch.testing.assert_close(method(inputs, target), expected)
    whole = MultiTeacherKD(weights=[0.9], ce_weight=1 - 0.9)(
        method.student(**inputs), [method.guides[0](**inputs)], target
    )
    torch.testing.assert_close(whole, expected)


def test_steps_in_chunks_and_by_relations():
    inputs, target = encoded()
    networks = [with_features(bert(seed), ["bert.pooler"]) for seed in (1, 2)]
    method = RKD(*networks).train()
    before = snapshot(method.student)
    parts = method.step(torch.optim.SGD(method.parameter_groups(0.1)), inputs, target, chunks=2)
    assert set(parts) == {"ce", "distance", "angle"} and all(part.isfinite() for part in parts.values())
    assert not same(snapshot(method.student), before)


def test_orc_says_that_tokens_cannot_be_mixed():
    inputs, target = encoded()
    with pytest.raises(TypeError, match=r"^ORC: inputs must be a floating-point tensor"):
        next(ORC(bert(1), [bert(2), bert(3)]).phases(inputs, target))
