"""Decoding without a cache, one row at a time: the reference of the generation tests."""

import torch


def allowed_next(tokens, config, grid=None):
    """The set of tokens that may follow, by walking over the row with a small state machine."""
    codes = grid if grid is not None else config.image_grid
    codes = codes[0] * codes[1]
    ranges = config.modality_token_ranges
    span, inside = "text", 0
    for token in tokens:
        if token == config.boi_token_id:
            span, inside = "image", 0
        elif token == config.begin_of_speech_token_id:
            span, inside = "speech", 0
        elif token in (config.eoi_token_id, config.end_of_speech_token_id):
            span, inside = "text", 0
        else:
            inside += 1
    if span == "image":
        return set(range(*ranges["image"])) if inside < codes else {config.eoi_token_id}
    if span == "speech":
        allowed = set(range(*ranges["speech"])) if inside < config.max_speech_tokens else set()
        return allowed | ({config.end_of_speech_token_id} if inside else set())
    return set(range(*ranges["text"])) - {config.eoi_token_id, config.end_of_speech_token_id}


def constrain(scores, tokens, config, grid=None):
    allowed = allowed_next(tokens, config, grid)
    return torch.tensor([s if i in allowed else -float("inf") for i, s in enumerate(scores.tolist())])


@torch.no_grad()
def next_logits(model, tokens):
    """A full forward over the row so far, nothing kept from the last one."""
    return model(torch.tensor([tokens]), token_choice=True, use_cache=False).logits[0, -1]


def greedy(model, prompt, steps, grid=None, rule=None):
    tokens = list(prompt)
    for _ in range(steps):
        scores = next_logits(model, tokens) if rule is None else rule(tokens)
        tokens.append(int(constrain(scores, tokens, model.config, grid).argmax()))
    return tokens


def beam_search(model, prompt, steps, num_beams):
    """The rows of highest summed log-probability, `num_beams` kept at each step; no end token."""
    beams = [(0.0, list(prompt))]
    for _ in range(steps):
        grown = []
        for total, tokens in beams:
            scores = constrain(next_logits(model, tokens).log_softmax(-1), tokens, model.config)
            grown += [(total + s, [*tokens, i]) for i, s in enumerate(scores.tolist()) if s > -float("inf")]
        beams = sorted(grown, key=lambda beam: -beam[0])[:num_beams]
    return [tokens for _, tokens in beams]


def sample(model, prompts, steps, temperature):
    """One draw for the whole batch at each step, as generate() consumes the random numbers."""
    rows = [list(prompt) for prompt in prompts]
    for _ in range(steps):
        scores = [constrain(next_logits(model, row), row, model.config) / temperature for row in rows]
        drawn = torch.multinomial(torch.stack(scores).softmax(-1), num_samples=1)
        rows = [[*row, int(token)] for row, token in zip(rows, drawn)]
    return rows
