"""Prompts as stock pipelines encode them for transformers that are told which tokens are padding: T5 alone,
and language models."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from hashlib import sha256

import torch
from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.text import reason
from diffkd.models import text_encoders
from diffkd.models.prompts import Prompts
from diffkd.models.source import Source
from diffkd.models.text_encoders import TextEncoder

STATES, MASK = "encoder_hidden_states", "encoder_attention_mask"
SANA_TOKENS, LUMINA2_TOKENS, Z_IMAGE_TOKENS, QWEN_TOKENS = 300, 256, 512, 512  # by their pipelines' default
LUMINA2_SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of image-text "
    "alignment based on textual prompts or user prompts. <Prompt Start> "
)
QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
QWEN_DROPPED = 34  # tokens of the template before the prompt


class MaskedPrompts(Prompts):
    """A conditioner whose embeddings come with a mask, 1 for tokens and 0 for padding. Its subclasses are
    final. length: tokens of an embedding, padding and all."""

    length: int

    @property
    def example(self) -> dict[str, Tensor]:
        """As zeros, none of them padding: a prompt without any token is not one."""
        width = self.encoders[0].width
        return {STATES: torch.zeros(1, self.length, width), MASK: torch.ones(1, self.length)}

    def _states(
        self,
        texts: Sequence[str],
        longest: int,
        *,
        said: Sequence[str],
        layer: int | None = None,
        padding: str = "max_length",
    ) -> tuple[Tensor, Tensor]:
        """The encoder's hidden states of these texts (B, L, D), and their mask (B, L). layer: which hidden
        states, None for its output. The rest as for `Prompts.tokens`."""
        tokens = self.tokens(0, texts, longest, tell=True, padding=padding, said=said)
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        network = self.networks[0][1]
        if layer is None:
            return network(ids, attention_mask=mask)[0], mask
        return network(ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer], mask


class PixArtPrompts(MaskedPrompts):
    """What encode_prompt of PixArtAlphaPipeline and PixArtSigmaPipeline gives: T5's embeddings of prompts in
    small letters. length: 120 tokens of the first, 300 of the second, by default."""

    def __init__(self, source: Source, length: int) -> None:
        super().__init__(source, [text_encoders.t5(source, "")])
        self.length, self.way = length, f"pixart-{length}"

    def _embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        states, mask = self._states(_small(prompts), self.length, said=prompts)
        return {STATES: states, MASK: mask}


class SanaPrompts(MaskedPrompts):
    """What encode_prompt of SanaPipeline gives by default: Gemma 2's embeddings of the prompt in small
    letters after an instruction to describe it at length, of which the first token and the last 299 are kept.
    No prompt, and a negative one, come without instruction."""

    length = SANA_TOKENS

    def __init__(self, source: Source) -> None:
        super().__init__(source, [text_encoders.language_model(source, "Gemma2Model", padding="right")])
        self.instruction = _sana_instruction()
        self.way = f"sana-{SANA_TOKENS}-{sha256(self.instruction.encode()).hexdigest()[:8]}"

    def _embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return self._after(self.instruction, prompts)

    def _embed_null(self, prompt: str) -> dict[str, Tensor]:
        return self._after("", [prompt])

    def _after(self, instruction: str, prompts: Sequence[str]) -> dict[str, Tensor]:
        longest = SANA_TOKENS
        if instruction:
            longest += len(self.networks[0][0].encode(instruction)) - 2
        texts = [instruction + prompt for prompt in _small(prompts)]
        states, mask = self._states(texts, longest, said=prompts)
        kept = [0, *range(1 - SANA_TOKENS, 0)]
        return {STATES: states[:, kept], MASK: mask[:, kept]}


class Lumina2Prompts(MaskedPrompts):
    """What encode_prompt of Lumina2Pipeline gives: Gemma 2's last layer but one, of a sentence about the
    assistant and then the prompt. No prompt, and a negative one, come without the sentence."""

    length, way = LUMINA2_TOKENS, f"lumina2-{LUMINA2_TOKENS}"

    def __init__(self, source: Source) -> None:
        super().__init__(source, [text_encoders.language_model(source, "Gemma2Model", padding="right")])

    def _embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return self._of([LUMINA2_SYSTEM + prompt for prompt in prompts], prompts)

    def _embed_null(self, prompt: str) -> dict[str, Tensor]:
        return self._of([prompt], [prompt])

    def _of(self, texts: Sequence[str], prompts: Sequence[str]) -> dict[str, Tensor]:
        states, mask = self._states(texts, LUMINA2_TOKENS, said=prompts, layer=-2)
        return {STATES: states, MASK: mask}


class ZImagePrompts(MaskedPrompts):
    """What encode_prompt of ZImagePipeline gives, padded: Qwen 3's last layer but one of the prompt as a
    chat, by the template of the pipeline's tokenizer. Its padding, which the pipeline leaves out, has mask 0.
    """

    length, way = Z_IMAGE_TOKENS, f"z-image-{Z_IMAGE_TOKENS}"

    def __init__(self, source: Source) -> None:
        super().__init__(source, [text_encoders.language_model(source, "Qwen3Model")])

    def _embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        chats = [self._chat(prompt) for prompt in prompts]
        states, mask = self._states(chats, Z_IMAGE_TOKENS, said=prompts, layer=-2)
        return {STATES: states, MASK: mask}

    def _chat(self, prompt: str) -> str:
        """Raises UserError where the tokenizer has no template that works."""
        try:
            text: str = self.networks[0][0].apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True,
                enable_thinking=True,
            )  # fmt: skip
        except Exception as error:  # whatever the template, which is a program, makes it do
            raise UserError(
                f"{self.name}: the tokenizer in {self.encoders[0].tokenizer} makes no chat of a prompt "
                f"({reason(error)[:200]}); is its chat template there?"
            ) from error
        return text


class QwenImagePrompts(MaskedPrompts):
    """What encode_prompt of QwenImagePipeline gives, padded: the last layer of Qwen 2.5 VL for the prompt
    within a template, whose first tokens are dropped. The pipeline pads to the longest prompt of a batch;
    more padding, which is masked, changes nothing.

    No prompt is a blank one, which its pipeline's documentation names for it.
    """

    length, way = QWEN_TOKENS, f"qwen-image-{QWEN_TOKENS}"

    def __init__(self, source: Source) -> None:
        encoder: TextEncoder = text_encoders.language_model(source, "Qwen2_5_VLForConditionalGeneration")
        super().__init__(source, [encoder])

    def _embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        texts = [QWEN_TEMPLATE.format(prompt) for prompt in prompts]
        longest = QWEN_TOKENS + QWEN_DROPPED
        states, mask = self._states(texts, longest, said=prompts, layer=-1, padding="longest")
        padded = states.new_zeros(len(prompts), QWEN_TOKENS, states.shape[-1])
        told = mask.new_zeros(len(prompts), QWEN_TOKENS)
        for row, (state, one) in enumerate(zip(states, mask.bool(), strict=True)):
            kept = state[one][QWEN_DROPPED:]
            padded[row, : len(kept)], told[row, : len(kept)] = kept, 1
        return {STATES: padded, MASK: told}

    def null(self, prompt: str | None = None) -> dict[str, Tensor]:
        return super().null(" " if prompt is None else prompt)


def _small(prompts: Sequence[str]) -> list[str]:
    return [prompt.lower().strip() for prompt in prompts]


def _sana_instruction() -> str:
    """What the installed diffusers puts before a prompt."""
    from diffusers import SanaPipeline

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)
