"""The model written out again with loops and boolean masks, from its weights by name: the reference of the tests."""

# L tokens of one row, D hidden size, H heads, h head dimension

import math

import torch


def weights_of(model, dtype=torch.float64):
    """name -> leaf tensor, so that gradients can be compared by name as well."""
    return {name: p.detach().to(dtype).clone().requires_grad_() for name, p in model.named_parameters()}


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(heads, positions, theta):
    """RoPE, one pair of dimensions (j, j + h/2) at a time.  (L, H, h) -> (L, H, h)

    Angles are float32 in every Llama, whatever the model's dtype; so they are here.
    """
    half = heads.shape[-1] // 2
    columns = [None] * (2 * half)
    for j in range(half):
        angle = positions.float() * (1.0 / theta ** (torch.tensor(2.0 * j) / (2 * half)))
        cos, sin = (f(angle).to(heads.dtype).unsqueeze(-1) for f in (torch.cos, torch.sin))
        a, b = heads[..., j], heads[..., j + half]
        columns[j], columns[j + half] = a * cos - b * sin, b * cos + a * sin
    return torch.stack(columns, dim=-1)


def swiglu(x, w, name):
    gate = x @ w[f"{name}.gate_proj.weight"].T
    return (gate * gate.sigmoid() * (x @ w[f"{name}.up_proj.weight"].T)) @ w[f"{name}.down_proj.weight"].T


def causal_softmax_attention(query, key, value, visible):
    """softmax(Q K^T / sqrt(d_k)) V, each head alone, queries of a group reading one key head."""
    group = query.shape[1] // key.shape[1]
    outputs = []
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // group].T / math.sqrt(query.shape[-1])
        outputs.append(scores.masked_fill(~visible, -math.inf).softmax(-1) @ value[:, head // group])
    return torch.stack(outputs, dim=1).flatten(1)


def algorithm_1(x, m, modalities, w, layer, config, visible):
    """The paper's Algorithm 1, line by line, for one row.  (L, D), (L,) -> (L, D)

    The paper leaves out what every Llama-like model has: rotary embeddings, and a causal mask.
    """
    attn, norm = f"model.layers.{layer}.self_attn", f"model.layers.{layer}"
    heads, eps = config.num_attention_heads, config.rms_norm_eps
    new = lambda: torch.zeros_like(x)  # noqa: E731
    Q, K, V = new(), new(), new()
    for modality in modalities:  # lines 3 to 7
        I_m = m == modalities.index(modality)
        X_m = x[I_m]
        Q = Q.masked_scatter(I_m[:, None], X_m @ w[f"{attn}.q_proj.{modality}.weight"].T)
        K = K.masked_scatter(I_m[:, None], X_m @ w[f"{attn}.k_proj.{modality}.weight"].T)
        V = V.masked_scatter(I_m[:, None], X_m @ w[f"{attn}.v_proj.{modality}.weight"].T)
    positions, theta = torch.arange(len(x)), config.rope_parameters["rope_theta"]
    Q, K, V = (t.unflatten(-1, (heads, -1)) for t in (Q, K, V))  # line 8
    A = causal_softmax_attention(rotate(Q, positions, theta), rotate(K, positions, theta), V, visible)  # line 9
    Y = new()
    for modality in modalities:  # lines 10 to 15
        I_m = m == modalities.index(modality)
        O_m = A[I_m] @ w[f"{attn}.o_proj.{modality}.weight"].T
        H_m = x[I_m] + rms_norm(O_m, w[f"{norm}.input_layernorm.{modality}.weight"], eps)
        F_m = swiglu(H_m, w, f"model.layers.{layer}.mlp.{modality}")
        Y_m = H_m + rms_norm(F_m, w[f"{norm}.post_attention_layernorm.{modality}.weight"], eps)
        Y = Y.masked_scatter(I_m[:, None], Y_m)
    return Y  # line 16


def by_modality(x, m, towers, module):
    """Every tower on the whole row, then a boolean mask: wasteful, and plainly right."""
    rows = None
    for tower in dict.fromkeys(towers):
        of_tower = torch.tensor([towers[i] == tower for i in m.tolist()])
        output = module(x, tower)
        rows = torch.zeros_like(output) if rows is None else rows
        rows = torch.where(of_tower[:, None], output, rows)
    return rows


def masked_layer(x, m, towers, w, layer, config, visible):
    """A pre-norm layer on the same weights.  (L, D) -> (L, D)"""
    attn, eps, theta = f"model.layers.{layer}.self_attn", config.rms_norm_eps, config.rope_parameters["rope_theta"]
    positions = torch.arange(len(x))

    def norm(which):
        return lambda x, tower: rms_norm(x, w[f"model.layers.{layer}.{which}.{tower}.weight"], eps)

    def linear(which):
        return lambda x, tower: x @ w[f"{attn}.{which}.{tower}.weight"].T

    normed = by_modality(x, m, towers, norm("input_layernorm"))
    Q, K, V = (by_modality(normed, m, towers, linear(f"{c}_proj")).unflatten(-1, (-1, config.head_dim)) for c in "qkv")
    A = causal_softmax_attention(rotate(Q, positions, theta), rotate(K, positions, theta), V, visible)
    x = x + by_modality(A, m, towers, linear("o_proj"))
    normed = by_modality(x, m, towers, norm("post_attention_layernorm"))
    return x + by_modality(normed, m, towers, lambda x, tower: swiglu(x, w, f"model.layers.{layer}.mlp.{tower}"))


def naive_logits(w, config, input_ids, modality_ids, visible=None):
    """Logits of one row.  (L,), (L,) -> (L, V)"""
    towers = [config.towers[name] for name in config.modalities]
    if visible is None:
        visible = torch.ones(len(input_ids), len(input_ids), dtype=torch.bool).tril()
    x = w["model.embed_tokens.weight"][input_ids]
    for layer in range(config.num_hidden_layers):
        if config.norm_position == "post":
            x = algorithm_1(x, modality_ids, config.modalities, w, layer, config, visible)
        else:
            x = masked_layer(x, modality_ids, towers, w, layer, config, visible)
    eps = config.rms_norm_eps
    x = by_modality(x, modality_ids, towers, lambda x, tower: rms_norm(x, w[f"model.norm.{tower}.weight"], eps))
    return x @ w["lm_head.weight"].T
