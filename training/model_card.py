"""The card of a folder that a run leaves: what it is, how it was made, how to load it; every figure from the manifest."""

from collections.abc import Mapping
from typing import Any

from modeling_mot import MoTPreTrainedModel, MoTTransfusionModel


def card(model: MoTPreTrainedModel, manifest: Mapping[str, Any], weights: str) -> str:
    """README.md of a consolidated checkpoint.

    Args:
        manifest: of the checkpoint.
        weights: `trained` or `average`.
    """
    config, recipe = model.config, manifest["config"]
    auto_class = "AutoModel" if isinstance(model, MoTTransfusionModel) else "AutoModelForCausalLM"
    active, total = config.num_parameters(active=True), config.num_parameters(active=False)
    sources = ", ".join(f"`{source['name']}` ({source['path']})" for source in recipe["data"]["sources"])
    average = recipe["train"]["ema_decay"]
    what = "the weights of the last step" if weights == "trained" else f"the moving average of the weights ({average})"
    return f"""---
library_name: transformers
tags: [mixture-of-transformers, multimodal]
---

# Mixture-of-Transformers, variant `{recipe["model"]["variant"]}`

{", ".join(config.modalities)}: {active / 1e6:.1f} M active parameters of {total / 1e6:.1f} M
([arXiv 2411.04996](https://arxiv.org/abs/2411.04996)).

```python
from transformers import {auto_class}, AutoProcessor

folder = "."  # or the repository on the Hub, with its revision pinned
model = {auto_class}.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
```

| | |
|---|---|
| step | {manifest["step"]:,} of {recipe["train"]["steps"]:,} |
| rows | {manifest["rows"]:,} of {recipe["data"]["row_length"]:,} tokens |
| data | {sources} |
| fingerprint of the data | `{manifest["data_fingerprint"]}` |
| peak learning rate | {recipe["optimizer"]["lr"]:g} |
| processes | {manifest["world"]["processes"]} |
| weights | {what} |

The data decide what the model may be used for; see their licences.
"""
