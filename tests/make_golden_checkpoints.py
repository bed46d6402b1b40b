"""Writes `tests/constructions/golden`: small random decoders as `transformers` saves and runs them.

    python tests/make_golden_checkpoints.py

needs torch and transformers, which the tests do not. Each folder is a checkpoint and `io.npz`, with
`tokens` [batch, time] and `logits` [batch, time, word] in the dtype of the weights. Biases and
gains are drawn too: as they are initialised, 0 and 1, mistakes with them would not be seen.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

GOLDEN = Path(__file__).parent / "constructions" / "golden"
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


def gpt2_config(**more: Any) -> GPT2Config:
    sizes = {"vocab_size": 23, "n_positions": 10, "n_embd": 8, "n_head": 2, "n_layer": 2}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**(sizes | drop | IDS | more))


def opt_config(**more: Any) -> OPTConfig:
    sizes = {"vocab_size": 19, "max_position_embeddings": 11, "hidden_size": 8, "ffn_dim": 12}
    sizes |= {"num_attention_heads": 4, "num_hidden_layers": 2, "word_embed_proj_dim": 8}
    return OPTConfig(**(sizes | {"dropout": 0.0} | IDS | more))


#: name -> (model, config, dtype, arguments of save_pretrained)
CASES: dict[str, tuple[Any, Any, torch.dtype, dict[str, Any]]] = {
    "gpt2": (GPT2LMHeadModel, gpt2_config(), torch.float32, {}),
    "gpt2_double": (
        GPT2LMHeadModel,
        gpt2_config(n_inner=12, n_layer=3, n_head=1, layer_norm_epsilon=1e-2),
        torch.float64,
        {},
    ),
    "opt_sharded": (OPTForCausalLM, opt_config(), torch.float32, {"max_shard_size": "3KB"}),
    "opt_double": (OPTForCausalLM, opt_config(), torch.float64, {}),
}


def random_model(maker: Any, config: Any, dtype: torch.dtype, seed: int = 0) -> Any:
    """A model with all weights from N(0, .3^2), gains from N(1, .3^2)."""
    torch.manual_seed(seed)
    model = maker(config).to(dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            gain = weight.ndim == 1 and name.endswith("weight")
            weight.normal_(float(gain), 0.3)
    return model


def scores(model: Any, tokens: np.ndarray) -> np.ndarray:
    """The model's scores of the next token."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def main() -> None:
    """Write every case."""
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for name, (maker, config, dtype, saving) in CASES.items():
        model = random_model(maker, config, dtype)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 10))
        model.save_pretrained(GOLDEN / name, **saving)
        (GOLDEN / name / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(GOLDEN / name / "io.npz", tokens=tokens, logits=scores(model, tokens))


if __name__ == "__main__":
    main()
