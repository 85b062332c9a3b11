"""Tokenise a prompt and its continuation as one text, with a token border where they meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Texts to put in front of a continuation; the first one that the tokenizer does not merge with it is used.
_ANCHORS = ("\n", ":", "|", "0", "a", "A", ".", "\u00e9")


def tokens_of(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each text, without the special tokens that the tokenizer puts around texts."""
    encoded = tokenizer(list(texts), add_special_tokens=False, padding=False, truncation=False)
    return [list(ids) for ids in encoded["input_ids"]]


def continued(tokenizer: Any, prompts: Sequence[str], texts: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens of prompts, and the tokens of their continuations.

    Together they are the tokens of prompt and continuation as one text: a continuation gets no second beginning, such as
    the blank that SentencePiece puts in front of a text. A tokenizer may merge the end of a prompt with the beginning of
    its continuation into one token. The border is kept even then: the prompt is tokenised on its own, in training as in
    generation, and the continuation as a text that begins at the border.

    Args:
        tokenizer: A tokenizer of transformers.
        prompts: Texts.
        texts: The continuation of each.

    Returns:
        Token ids of the prompts and of the continuations.

    Raises:
        ValueError: If a continuation has no tokens of its own behind its prompt; the message has both texts.
    """
    prompt_ids = tokens_of(tokenizer, prompts)
    wholes = tokens_of(tokenizer, [prompt + text for prompt, text in zip(prompts, texts, strict=True)])
    rests = [whole[len(start) :] for start, whole in zip(prompt_ids, wholes, strict=True)]
    merged = [place for place, start in enumerate(prompt_ids) if wholes[place][: len(start)] != start]
    # Decode from one token before the first difference on: the first token of a text may lose its blank.
    common = {place: max(0, _common(prompt_ids[place], wholes[place]) - 1) for place in merged}
    wanted = {place: decoded(tokenizer, wholes[place][common[place] :]) for place in merged}
    for front in ("", *_ANCHORS):
        if not merged:
            return prompt_ids, rests
        start = tokens_of(tokenizer, [front])[0]
        left = []
        for place, ids in zip(merged, tokens_of(tokenizer, [front + texts[place] for place in merged]), strict=True):
            rests[place] = ids[len(start) :]
            read = decoded(tokenizer, prompt_ids[place][common[place] :] + rests[place])
            if ids[: len(start)] != start or read != wanted[place]:
                left.append(place)
        merged = left
    if merged:
        raise ValueError(
            f"The tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no tokens for {texts[merged[0]][:40]!r} behind"
            f" {prompts[merged[0]][-40:]!r} that read as the two texts together. Give another --data.prompt_style."
        )
    return prompt_ids, rests


def chained(tokenizer: Any, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """Return the tokens of each piece of each row, with a token border where pieces meet.

    Together they are the tokens of a row's pieces as one text; where a tokenizer would merge across a border, the border is
    kept as `continued` keeps it.

    Args:
        tokenizer: A tokenizer of transformers.
        rows: The pieces of each row, one after the other.

    Returns:
        Token ids, as many lists per row as it has pieces.

    Raises:
        ValueError: If a piece has no tokens of its own behind those before it.
    """
    upto = [["".join(pieces[: number + 1]) for number in range(len(pieces))] for pieces in rows]
    flat = iter(tokens_of(tokenizer, [text for texts in upto for text in texts]))
    found = []
    for pieces, texts in zip(rows, upto, strict=True):
        wholes = [next(flat) for _ in texts]
        parts = [wholes[0]]
        for number in range(1, len(pieces)):
            before, whole = wholes[number - 1], wholes[number]
            if whole[: len(before)] == before:
                parts.append(whole[len(before) :])
            else:
                parts.append(continued(tokenizer, [texts[number - 1]], [pieces[number]])[1][0])
        found.append(parts)
    return found


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of tokens, special ones and all blanks included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
