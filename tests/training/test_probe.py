"""The head that training starts from is the linear probe, folded into the model's own layer."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, PreTrainedModel, T5Config

from adapter_hub.base_model import unsaid
from adapter_hub.training.probe import DEVIATION_FLOOR, logistic_regression, output_layer, probe, start_from_probe

SMALL = {"vocab_size": 40, "num_labels": 3, "pad_token_id": 0}
CONFIGS = {
    "bert": BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **SMALL),
    "gpt2": GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, **SMALL),
    "t5": T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, eos_token_id=1, decoder_start_token_id=0, **SMALL),
}


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(CONFIGS[kind])


def batches() -> list[dict[str, Tensor]]:
    """20 rows of 2 to 7 tokens that end with token 1, in batches of 8, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.cat([torch.randint(2, 40, (1 + i % 6,), generator=generator), torch.tensor([1])]) for i in range(20)]
    found = []
    for start in range(0, len(rows), 8):
        ids = torch.nn.utils.rnn.pad_sequence(rows[start : start + 8], batch_first=True)
        found.append({"input_ids": ids, "attention_mask": (ids > 0).long()})
    return found


def logits_of(model: PreTrainedModel) -> np.ndarray:
    with torch.no_grad():
        return torch.cat([model.eval()(**batch).logits for batch in batches()]).numpy()


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_after_the_probe_the_model_fits_the_rows_better_than_before(kind: str) -> None:
    model, targets = model_of(kind), np.arange(20) % 3
    before = (logits_of(model).argmax(axis=1) == targets).mean()
    assert start_from_probe(model, batches(), targets)
    assert (logits_of(model).argmax(axis=1) == targets).mean() > before


def test_the_models_logits_are_the_probes_on_the_features_of_the_last_layer() -> None:
    model, targets = model_of("bert"), np.arange(20) % 3
    with torch.no_grad():
        features = torch.cat([model.eval().bert(**batch).pooler_output for batch in batches()]).double().numpy()
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    expected = LogisticRegression(C=0.1, max_iter=1000).fit(scaled, targets).decision_function(scaled)
    start_from_probe(model, batches(), targets)
    np.testing.assert_allclose(logits_of(model), expected, atol=1e-3)


def test_two_classes_get_an_output_each() -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(BertConfig(**(CONFIGS["bert"].to_dict() | {"num_labels": 2})))
    targets = np.arange(20) % 2
    start_from_probe(model, batches(), targets)
    logits = logits_of(model)
    np.testing.assert_allclose(logits.sum(axis=1), 0, atol=1e-5)
    assert (logits.argmax(axis=1) == targets).mean() > 0.5


def test_only_the_output_layer_changes() -> None:
    model = model_of("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start_from_probe(model, batches(), np.arange(20) % 3)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_a_head_without_one_output_layer_is_left_as_it_was() -> None:
    model = model_of("bert")
    model.classifier = torch.nn.Sequential(torch.nn.Linear(16, 3), torch.nn.Linear(3, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert output_layer(model) is None
    assert not start_from_probe(model, batches(), np.arange(20) % 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_many_classes_are_met_by_the_nearest_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_hub.training.probe.CELLS_MAX", 1)
    generator = np.random.default_rng(0)
    targets = np.arange(60) % 5
    features = generator.standard_normal((60, 8)) * generator.uniform(0.5, 3, 8) + 4 * generator.standard_normal((5, 8))[targets]
    weight, bias = probe(features, targets)
    scaled = (features - features.mean(axis=0)) / (features.std(axis=0) + DEVIATION_FLOOR)
    means = np.array([scaled[targets == number].mean(axis=0) for number in range(5)])
    nearest = ((scaled[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert ((features @ weight.T + bias).argmax(axis=1) == nearest).all()


def test_it_is_silent_where_labels_are_many_or_iterations_few_and_other_warnings_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_hub.training.probe.ITERATIONS_MAX", 1)
    features = np.random.default_rng(0).standard_normal((30, 8))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        logistic_regression(features, np.arange(30) % 20, 1.0)
        with unsaid("of this"):
            warnings.warn("of this too", UserWarning, stacklevel=1)
            warnings.warn("not of this", UserWarning, stacklevel=1)
        warnings.warn("of this again", UserWarning, stacklevel=1)
    assert [str(one.message) for one in warned] == ["not of this", "of this again"]
