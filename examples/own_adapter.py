"""An adapter made with PEFT, registered and asked: from a base model to an answer in one short program.

    python examples/own_adapter.py

The base is a tiny causal model with random weights, written to a temporary folder, so that nothing is downloaded and the program ends
in seconds; a real base is a hub id or a folder in its place. What is trained is one sentence, and it comes back word for word.
"""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from adapter_hub import Hub
from adapter_hub.testing import tiny_model

QUESTION, ANSWER = "what time is it?", " half past nine"
STEPS_MAX = 400
disable_progress_bar()


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="own-adapter-") as folder:
        base = tiny_model(Path(folder) / "base", "llama")
        with Hub.create(Path(folder) / "registry", base_model=base, encoder="hash") as hub:
            ref = hub.register("clock", trained(base), examples=[QUESTION, "tell me the time", "how late is it?"])
            print(f"{ref} is registered in {hub}")
            [routed] = hub.predict([QUESTION], max_false_reject=0, generation={"max_new_tokens": 16})
            [plain] = hub.predict([QUESTION], adapters=[None], generation={"max_new_tokens": 16})
            print(f"{routed.adapter} answers {routed.text!r}")
            print(f"the base model answers {plain.text!r}")


def trained(base: Path) -> PeftModel:
    """A LoRA adapter on the base that has learned one answer by heart."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    prompt, whole = tokenizer(QUESTION)["input_ids"], tokenizer(QUESTION + ANSWER)["input_ids"] + [tokenizer.eos_token_id]
    ids, targets = torch.tensor([whole]), torch.tensor([[-100] * len(prompt) + whole[len(prompt) :]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(STEPS_MAX):
        loss = model(input_ids=ids, labels=targets).loss
        if loss < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


if __name__ == "__main__":
    main()
