"""Use an adapter with plain transformers: three lines, then `generate` and `pipeline` as ever.

python examples/inference.py --base MODEL_DIR --adapter ADAPTER_DIR --prompt "Question: ..."
"""

from __future__ import annotations

import argparse
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from lightning_pmss import load_adapter, merged


def main(arguments: list[str] | None = None) -> dict[str, str]:
    """Return the continuation by `generate`, by `pipeline`, and with merged weights."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", required=True, help="folder of the base model, or its id on the hub")
    parser.add_argument("--adapter", required=True, help="adapter folder")
    parser.add_argument("--prompt", default="Question: Tom has 3 apples and buys 4 more. How many has he?\nAnswer:")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    options = parser.parse_args(arguments)

    model: Any = AutoModelForCausalLM.from_pretrained(options.base)
    load_adapter(model, options.adapter)
    model.eval()

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    greedy = {"max_new_tokens": options.max_new_tokens, "do_sample": False}

    def generated() -> str:
        ids = tokenizer(options.prompt, return_tensors="pt")
        tokens = model.generate(**ids, **greedy)[0, ids["input_ids"].shape[1] :]
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    texts = {"generate": generated()}
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts["pipeline"] = writer(options.prompt, return_full_text=False, **greedy)[0]["generated_text"]
    with merged(model):  # faster for many tokens; the pristine weights are back outside
        texts["merged"] = generated()
    for way, text in texts.items():
        print(f"{way:9} {text!r}")
    return texts


if __name__ == "__main__":
    main()
