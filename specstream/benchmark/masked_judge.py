"""A causal language model that says how likely it finds a text, for `metrics.JudgeNLL`."""

from __future__ import annotations

import torch
from torch import Tensor

from specstream.generation.loading import find_device
from specstream.models import PretrainedLM
from specstream.processors import TextProcessor


class CausalJudge:
    """Judges text in its own tokens, in float32.

    What exceeds the model's context is judged in windows that overlap by a half, so that every
    token but the first ones has at least half a context before it.

    Shapes: N tokens of the text.
    """

    def __init__(self, path: str, device: str = "auto") -> None:
        place = find_device(device)
        lm = PretrainedLM(path, "float32", device=place)
        self.lm = lm.eval().requires_grad_(False).to(place)
        self.processor = TextProcessor.from_pretrained(path)

    @torch.inference_mode()
    def __call__(self, prompt: str, text: str) -> Tensor:
        """Return the log-probabilities (N,) of the text's tokens after the prompt.

        Where the prompt has no token at all, the text's first token is given and not judged.
        """
        given = self.processor.encode(prompt)
        own = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        tokens = torch.tensor([*given, *own], dtype=torch.long, device=self.lm.device)
        done, total = max(len(given), 1), len(tokens)
        room = self.lm.max_positions or max(total, 2)
        if room < 2:
            raise ValueError(f"'{self.lm.path}' cannot judge: its context is of {room} tokens")
        found = [torch.zeros(0, device=self.lm.device)]
        while done < total:
            start = max(done - room // 2, 0) if total > room else 0
            end = min(start + room, total)
            logits = self.lm(tokens[None, start : end - 1])[0].float()  # (end - 1 - start, V)
            log_probs = logits.log_softmax(-1).gather(1, tokens[start + 1 : end, None])[:, 0]
            found.append(log_probs[done - start - 1 :])
            done = end
        return torch.cat(found)
