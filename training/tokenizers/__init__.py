"""Commands that train tokenizers: `python -m training.tokenizers.{text,image,speech,processor,vae}`."""
