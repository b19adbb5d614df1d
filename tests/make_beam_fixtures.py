"""Write tests/fixtures/diverse_beam.json: what transformers 4.55.4 gives.

It is the last one with group beam search built in.

    python -m venv old && old/bin/pip install torch==2.13.0 transformers==4.55.4
    old/bin/python tests/make_beam_fixtures.py

Models are tiny random Llamas whose weights come from a seed alone, whatever the library's version:
every parameter is filled from one generator in the order of its name. Their logits on one input are
kept too, so that a change of the models can be told apart from a change of the search.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

FILE = Path(__file__).parent / "fixtures" / "diverse_beam.json"
VOCABULARY, PAD, END = 48, 0, 1


def build_model(recipe: dict) -> LlamaForCausalLM:
    """A two-layer Llama; recipe: seed, scale of the weights, how much the end is favoured."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(recipe["seed"])
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if name.endswith("norm.weight"):
                weight.fill_(1.0)
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) * recipe["scale"])
        # the end token's direction is moved along what all states share
        mean = model.lm_head.weight.mean(0)
        model.lm_head.weight[END] += recipe["end"] * (model.lm_head.weight[END] - mean)
    return model


def prompts(batch: int, seed: int) -> tuple[list, list]:
    """Left-padded prompts of 2 to 9 tokens, and their masks; a single one is not padded."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (batch,), generator=generator).tolist()
    rows = [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    padding = [max(lengths) - length for length in lengths]
    ids = [[PAD] * pad + row for pad, row in zip(padding, rows, strict=True)]
    return ids, [[0] * pad + [1] * len(row) for pad, row in zip(padding, rows, strict=True)]


def cases() -> list[dict]:
    """Every case without what the library gives."""
    settings = []  # (model, batch, settings)
    for model in ("plain", "ends"):
        for batch in (1, 8):
            for beams, groups in ((5, 5), (6, 3), (6, 2)):
                for penalty in (0.5, 1.0, 5.0):
                    settings.append((model, batch, search(beams, groups, penalty)))
    changes = [
        {"num_return_sequences": 2}, {"length_penalty": 0.0}, {"length_penalty": 2.0},
        {"early_stopping": True}, {"early_stopping": "never", "length_penalty": 1.5},
        {"diversity_penalty": 1e-9}, {"repetition_penalty": 1.7},
    ]
    for change in changes:
        # transformers 5 no longer counts padding as repeated
        batch = 1 if "repetition_penalty" in change else 8
        settings.append(("ends", batch, search(6, 3, 1.0) | change))
    done = []
    shared = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": PAD, "eos_token_id": END}
    for i, (model, batch, options) in enumerate(settings):
        shown = ", ".join(f"{name} {value}" for name, value in options.items())
        input_ids, attention_mask = prompts(batch, i)
        done.append({
            "model": model,
            "settings": options | shared,
            "name": f"{model}, batch {batch}, {shown}",
            "input_ids": input_ids,
            "attention_mask": attention_mask,
        })
    return done


def search(beams: int, groups: int, penalty: float) -> dict:
    """Settings of `generate` that return all beams."""
    return {"num_beams": beams, "num_beam_groups": groups, "diversity_penalty": penalty,
            "num_return_sequences": beams}


def main() -> None:
    import transformers

    assert transformers.__version__ == "4.55.4", transformers.__version__
    recipes = {"plain": {"seed": 1, "scale": 0.35, "end": 0.0},
               "ends": {"seed": 2, "scale": 0.35, "end": 1.5}}
    models = {name: build_model(recipe) for name, recipe in recipes.items()}
    probe = torch.arange(2, 12)[None]
    for name, recipe in recipes.items():
        with torch.no_grad():
            recipe["probe"] = [round(x, 6) for x in models[name](probe).logits[0, -1].tolist()]
    done, early = cases(), 0
    for case in done:
        out = models[case["model"]].generate(
            torch.tensor(case["input_ids"]), attention_mask=torch.tensor(case["attention_mask"]),
            return_dict_in_generate=True, output_scores=True, **case["settings"])
        case["sequences"] = out.sequences.tolist()
        case["scores"] = [round(score, 6) for score in out.sequences_scores.tolist()]
        early += sum(END in row[len(case["input_ids"][0]):] for row in case["sequences"])
    FILE.parent.mkdir(exist_ok=True)
    kept = {"transformers": "4.55.4", "models": recipes, "cases": done}
    FILE.write_text(json.dumps(kept, separators=(",", ":")))
    print(f"{len(done)} cases, {early} sequences end early, {FILE.stat().st_size} bytes in {FILE}")


if __name__ == "__main__":
    main()
