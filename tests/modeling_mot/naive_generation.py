"""Decoding without a cache, one row at a time: the reference of the generation tests."""

import torch


def allowed_next(tokens, config, grid=None, left=1000, prompt=0):
    """The set of tokens that may follow, by walking over the row with a small state machine.

    `left` tokens may still come, this one among them; `prompt` are those that were given.
    """
    codes = grid if grid is not None else config.image_grid
    codes = codes[0] * codes[1]
    ranges = config.modality_token_ranges
    span, inside, is_own = "text", 0, False
    for place, token in enumerate(tokens):
        if token == config.boi_token_id:
            span, inside = "image", 0
        elif token == config.begin_of_speech_token_id:
            span, inside, is_own = "speech", 0, place >= prompt
        elif token in (config.eoi_token_id, config.end_of_speech_token_id):
            span, inside = "text", 0
        else:
            inside += 1
    if span == "image":
        return set(range(*ranges["image"])) if inside < codes else {config.eoi_token_id}
    if span == "speech":
        must_end = inside == config.max_speech_tokens or (left == 1 and inside and is_own)
        allowed = set() if must_end else set(range(*ranges["speech"]))
        return allowed | ({config.end_of_speech_token_id} if inside else set())
    allowed = set(range(*ranges["text"])) - {config.eoi_token_id, config.end_of_speech_token_id}
    if left < 1 + codes + 1:
        allowed.discard(config.boi_token_id)
    if left < 1 + 1 + 1:
        allowed.discard(config.begin_of_speech_token_id)
    return allowed


def constrain(scores, tokens, config, grid=None, left=1000, prompt=0):
    allowed = allowed_next(tokens, config, grid, left, prompt)
    return torch.tensor([s if i in allowed else -float("inf") for i, s in enumerate(scores.tolist())])


@torch.no_grad()
def next_logits(model, tokens):
    """A full forward over the row so far, nothing kept from the last one."""
    return model(torch.tensor([tokens]), token_choice=True, use_cache=False).logits[0, -1]


def greedy(model, prompt, steps, grid=None, rule=None):
    tokens = list(prompt)
    for step in range(steps):
        scores = next_logits(model, tokens) if rule is None else rule(tokens)
        scores = constrain(scores, tokens, model.config, grid, steps - step, len(prompt))
        tokens.append(int(scores.argmax()))
    return tokens


def beam_search(model, prompt, steps, num_beams):
    """The rows of highest summed log-probability, `num_beams` kept at each step; no end token."""
    beams = [(0.0, list(prompt))]
    for step in range(steps):
        grown, left = [], steps - step
        for total, tokens in beams:
            scores = next_logits(model, tokens).log_softmax(-1)
            scores = constrain(scores, tokens, model.config, left=left, prompt=len(prompt))
            grown += [(total + s, [*tokens, i]) for i, s in enumerate(scores.tolist()) if s > -float("inf")]
        beams = sorted(grown, key=lambda beam: -beam[0])[:num_beams]
    return [tokens for _, tokens in beams]


def sample(model, prompts, steps, temperature):
    """One draw for the whole batch at each step, as generate() consumes the random numbers."""
    rows = [list(prompt) for prompt in prompts]
    for step in range(steps):
        scores = [
            constrain(next_logits(model, row), row, model.config, left=steps - step, prompt=len(prompt)) / temperature
            for row, prompt in zip(rows, prompts)
        ]
        drawn = torch.multinomial(torch.stack(scores).softmax(-1), num_samples=1)
        rows = [[*row, int(token)] for row, token in zip(rows, drawn)]
    return rows
