"""Before its head is probed, a fresh adapter lets what the head reads say what the whole text says.

A classifier's head reads one place, as a rule through layers that nobody trained: BERT's first token and pooler. The mean of all tokens
says more, and no adapter can move the head to it. So the adapter's first steps, which need no labels, are these: a linear map of the
head's input is to give the mean of the frozen base's last hidden states, as it differs from row to row (hint-based training, Romero et
al. 2015, "FitNets: Hints for thin deep nets", with the model its own teacher). The map is let go, and the head is probed on the result.
"""

# n rows, h width of the head's input, d hidden width

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import PreTrainedModel, get_scheduler

from adapter_hub.training.config import TrainConfig
from adapter_hub.training.loop import batches
from adapter_hub.training.probe import inputs_of, one_a_row, output_layer
from adapter_hub.training.tasks import Features

PENALTY = 0.1      # of the first map, in parts of the mean variance of what the head reads
NORM_MAX = 1.0     # of a step's gradient, as the Trainer's
TOGETHER = 8       # steps whose rows are sorted by length, as far as chance has brought them together


def hint_of(whole: PreTrainedModel, rows: Sequence[Features]) -> Tensor:
    """(n, d): the mean over each row's tokens of the last hidden states, of unit length, less what all rows have in common."""
    found, was_training = [], whole.training
    whole.train(False)
    with torch.no_grad():
        for batch in batches(rows, whole.config.pad_token_id):
            batch = {key: tensor.to(whole.device) for key, tensor in batch.items()}
            mask = batch["attention_mask"][:, :, None]
            hidden = whole.base_model(**batch)[0]
            found.append(normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1))
    whole.train(was_training)
    means = torch.cat(found)
    return means - means.mean(dim=0)


def align(model: PeftModel, rows: Sequence[Features], hint: Tensor, config: TrainConfig) -> None:
    """Train the adapter alone, not the head, for `align_steps` steps. Of a head without one linear output layer nothing is changed.

    `hint` (n, d) is the frozen base's, of these rows. A step is one batch, in float32; rate, schedule, warm-up and decay are the config's, and
    what varies the rows of later steps (R-Drop, token dropout, noise) is left out.
    """
    whole = cast(PreTrainedModel, model.get_base_model())
    layer, pad, device = output_layer(whole), whole.config.pad_token_id, whole.device
    if layer is None:
        return
    read = torch.from_numpy(inputs_of(layer, model, batches(rows, pad))).to(device)
    weight, bias = (torch.nn.Parameter(part) for part in _map(read, hint))
    adapter = [parameter for name, parameter in model.named_parameters() if parameter.requires_grad and ".lora_" in name]
    steps = config.align_steps
    optimizer = torch.optim.AdamW([*adapter, weight, bias], lr=config.learning_rate, weight_decay=config.weight_decay)
    warm = math.floor(config.warmup_ratio * steps)
    schedule = get_scheduler(config.schedule, optimizer, num_warmup_steps=warm, num_training_steps=steps)
    order, was_training, seen = _order([len(row["input_ids"]) for row in rows], config.batch_size), model.training, list[Tensor]()
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.train()
    try:
        for places in islice(order, steps):
            batch = next(batches([rows[place] for place in places], pad, len(places)))
            batch = {key: tensor.to(device) for key, tensor in batch.items()}
            model(**batch)
            said = one_a_row(seen.pop(), batch["attention_mask"]) @ weight + bias
            loss = 1 - cosine_similarity(said, hint[places], dim=1).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(adapter, NORM_MAX)
            optimizer.step()
            schedule.step()
            model.zero_grad()
            optimizer.zero_grad()
    finally:
        hook.remove()
        model.train(was_training)


def _map(read: Tensor, hint: Tensor) -> tuple[Tensor, Tensor]:
    """(weight (h, d), bias (d,)) of the ridge regression from what the head reads (n, h) to the hint (n, d), which is centred."""
    centre = read.mean(dim=0)
    gram = (read - centre).T @ (read - centre)
    gram.diagonal().add_(PENALTY * gram.diagonal().mean() + torch.finfo(gram.dtype).eps)
    weight = torch.linalg.solve(gram, (read - centre).T @ hint.double())
    return weight.float(), (-centre @ weight).float()


def _order(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Places of the rows of each step, of like length: all of them, drawn anew, again and again."""
    while True:
        drawn = torch.randperm(len(lengths)).tolist()
        rooms = (sorted(drawn[start : start + TOGETHER * size], key=lengths.__getitem__) for start in range(0, len(drawn), TOGETHER * size))
        steps = [room[start : start + size] for room in rooms for start in range(0, len(room), size)]
        yield from (steps[place] for place in torch.randperm(len(steps)).tolist())
