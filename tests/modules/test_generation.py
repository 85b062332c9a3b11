"""Texts of a batch: stop strings, beams, independence of the other rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_pmss.evaluation.generation import Generation, cut
from lightning_pmss.modules import CausalLMModule

PROMPTS = (
    "Once upon a time, there was a",
    "Tom",
    "The big dog and a cat",
    "One day Lily went to the park with her mom",
)


@pytest.fixture(scope="module")
def stories(shared: Path) -> CausalLMModule:
    module = CausalLMModule(str(shared / "models" / "stories260K"))
    module.configure_model()
    return module.eval()


def padded(module: CausalLMModule, texts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    ids = [module.tokenizer(text).input_ids for text in texts]
    width, pad = max(map(len, ids)), module.tokenizer.pad_token_id
    rows = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    return rows, mask


def texts(module: CausalLMModule, prompts: tuple[str, ...], **options: Any) -> list[str]:
    return Generation(**options).texts(module.model, module.tokenizer, *padded(module, prompts))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("stop", [(), (".", "!")])
def test_texts_do_not_depend_on_the_batch(stories: CausalLMModule, beams: int, stop: tuple[str, ...]) -> None:
    options = {"max_new_tokens": 20, "num_beams": beams, "stop": stop}
    together = texts(stories, PROMPTS, **options)
    assert together == [texts(stories, (prompt,), **options)[0] for prompt in PROMPTS]
    assert len(set(together)) == len(PROMPTS)
    reverse = texts(stories, PROMPTS[::-1], **options)
    assert reverse[::-1] == together


def test_a_stop_string_ends_the_text_before_it_and_saves_steps(
    stories: CausalLMModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = texts(stories, PROMPTS, max_new_tokens=40)
    steps = []
    forward = stories.model.forward
    monkeypatch.setattr(stories.model, "forward", lambda *a, **k: (steps.append(1), forward(*a, **k))[1])
    stopped = texts(stories, PROMPTS, max_new_tokens=40, stop=("was a", " the"))
    assert stopped == [cut(text, ("was a", " the")).strip() for text in whole]
    assert stopped != whole
    assert len(steps) == 40  # one of the rows goes on to the end
    steps.clear()
    early = texts(stories, PROMPTS[:1], max_new_tokens=40, stop=(whole[0][5:12],))
    assert early == [cut(whole[0], (whole[0][5:12],)).strip()]
    assert 2 < len(steps) < 20


def test_a_stop_string_in_the_prompt_does_not_count(stories: CausalLMModule) -> None:
    whole = texts(stories, PROMPTS[:1], max_new_tokens=10)
    assert whole[0]
    assert texts(stories, PROMPTS[:1], max_new_tokens=10, stop=("upon",)) == whole


def test_beams_find_a_likelier_text(stories: CausalLMModule) -> None:
    """Against the log-probability of the greedy text, by hand; and equal to transformers' own beam search."""

    def score(tokens: Tensor) -> float:
        with torch.no_grad():
            log_p = stories.model(tokens[None]).logits[0].log_softmax(-1)
        new = range(ids.shape[1], len(tokens))
        return sum(log_p[place - 1, tokens[place]].item() for place in new)

    gains = []
    for prompt in PROMPTS:
        ids, mask = padded(stories, (prompt,))
        options = {"attention_mask": mask, "max_new_tokens": 15, "do_sample": False}
        greedy, beam = (stories.model.generate(ids, num_beams=n, **options)[0] for n in (1, 4))
        gains.append(score(beam) - score(greedy))
        expected = stories.tokenizer.decode(beam[ids.shape[1] :], skip_special_tokens=True).strip()
        assert texts(stories, (prompt,), max_new_tokens=15, num_beams=4) == [expected]
    assert max(gains) > 0.1


def test_cut_is_at_the_first_of_all_stop_strings() -> None:
    assert cut("a b c", ()) == "a b c"
    assert cut("a b c b", ("c", "b")) == "a "
    assert cut("abc", ("d",)) == "abc"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams=0 must be a whole number of at least 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5"),
        ({"stop": ["\n", ""]}, "contains an empty text"),
        ({"answer_by": "guess"}, "choose 'generation' or 'likelihood'"),
        ({"answer_by": "likelihood"}, "needs a metric that knows the labels"),
        ({"existing_predictions": "keep"}, "choose 'resume' or 'replace'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalLMModule("anything", **options)
