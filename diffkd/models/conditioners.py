"""Prompts as stock pipelines encode them: CLIP alone, and CLIP beside T5."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from diffkd.errors import UserError
from diffkd.models import text_encoders
from diffkd.models.prompts import Prompts
from diffkd.models.source import Source

SD3_TOKENS, FLUX_TOKENS = 256, 512  # of T5, by their pipelines' default


class ClipPrompts(Prompts):
    """What encode_prompt of StableDiffusionPipeline and StableDiffusionXLPipeline gives.

    two: SDXL's way, with the last layer but one of two encoders side by side, the pooled embedding of the
    second, and the image's size in time_ids. zeros: whether no prompt is zeros, not the encoding of "".
    """

    def __init__(self, source: Source, *, two: bool, zeros: bool) -> None:
        names = ("", "_2") if two else ("",)
        super().__init__(source, [text_encoders.clip(source, one, projected=one == "_2") for one in names])
        self.two, self.zeros = two, zeros
        self.way = f"{'xl' if two else 'sd'}-{'zeros' if zeros else 'encoded'}"
        _check_lengths(self)

    @property
    def example(self) -> dict[str, Tensor]:
        length, width = self.encoders[0].length or 0, sum(one.width for one in self.encoders)
        cond = {"encoder_hidden_states": torch.zeros(1, length, width)}
        if self.two:
            cond |= {
                "text_embeds": torch.zeros(1, self.encoders[-1].pooled or 0),
                "time_ids": torch.zeros(1, 6),
            }
        return cond

    def embed(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """encoder_hidden_states (B, 77, D); for SDXL text_embeds (B, P) and time_ids (B, 6): the original
        height and width, the crop's top and left, the target's height and width."""
        cond = super().embed(prompts)
        if self.two:
            if size is None:
                raise ValueError("SDXL is conditioned on the size of its images")
            cond["time_ids"] = torch.tensor([[*size, 0.0, 0.0, *size]]).repeat(len(prompts), 1)
        return cond

    def null(self, prompt: str | None = None) -> dict[str, Tensor]:
        cond = super().null(prompt)
        if prompt is None and self.zeros:
            return {key: torch.zeros_like(value) for key, value in cond.items()}
        return cond

    def _embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        states, pooled = [], None
        for number, (_, network) in enumerate(self.networks):
            tokens = self.tokens(number, prompts, self.encoders[0].length, tell=number == 0)
            masked = bool(getattr(network.config, "use_attention_mask", False)) and not self.two
            mask = tokens.attention_mask.to(self.device) if masked else None
            output = network(
                tokens.input_ids.to(self.device), attention_mask=mask, output_hidden_states=self.two
            )
            states.append(output.hidden_states[-2] if self.two else output[0])
            pooled = output[0] if self.two else None  # of the last encoder: its projection
        cond = {"encoder_hidden_states": torch.cat(states, -1)}
        return cond if pooled is None else {**cond, "text_embeds": pooled}


class SD3Prompts(Prompts):
    """What encode_prompt of StableDiffusion3Pipeline gives: the last layer but one of two CLIP encoders side
    by side, zeros up to T5's width, and after their tokens those of T5; the pooled embeddings of both.

    width: of T5's embeddings. A pipeline without T5 has zeros for them, of which one stands here for all
    (`joint_attention.LastRepeated`).
    """

    def __init__(self, source: Source, width: int) -> None:
        encoders = [text_encoders.clip(source, suffix, projected=True) for suffix in ("", "_2")]
        self.with_t5 = source.index.get("text_encoder_3") not in (None, [None, None])
        if self.with_t5:
            encoders.append(text_encoders.t5(source, "_3"))
        else:
            self.absent = ("text_encoder_3", "tokenizer_3")
        super().__init__(source, encoders)
        self.last = SD3_TOKENS if self.with_t5 else 1
        self.width, self.way = width, f"sd3-{self.last}-{width}"
        _check_lengths(self)
        found = encoders[2].width if self.with_t5 else width
        if found != width or sum(one.width for one in encoders[:2]) > width:
            raise UserError(
                f"{self.name} has text encoders of widths {', '.join(str(one.width) for one in encoders)}, "
                f"and its network takes {width}; are they of one model?"
            )

    @property
    def example(self) -> dict[str, Tensor]:
        length, pooled = self.encoders[0].length or 0, sum(one.pooled or 0 for one in self.encoders[:2])
        return {
            "encoder_hidden_states": torch.zeros(1, length + self.last, self.width),
            "pooled_projections": torch.zeros(1, pooled),
        }

    def _embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        states, pooled = [], []
        for number, (_, network) in enumerate(self.networks[:2]):
            tell = number == 0 and not self.with_t5
            tokens = self.tokens(number, prompts, self.encoders[0].length, tell=tell)
            output = network(tokens.input_ids.to(self.device), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled.append(output[0])
        clip = torch.cat(states, -1)
        if self.with_t5:
            tokens = self.tokens(2, prompts, SD3_TOKENS, tell=True)
            t5 = self.networks[2][1](tokens.input_ids.to(self.device))[0]
        else:
            t5 = clip.new_zeros(len(prompts), self.last, self.width)
        clip = functional.pad(clip, (0, self.width - clip.shape[-1]))
        return {
            "encoder_hidden_states": torch.cat([clip, t5], 1),
            "pooled_projections": torch.cat(pooled, -1),
        }


class FluxPrompts(Prompts):
    """What encode_prompt of FluxPipeline gives: T5's embeddings of 512 tokens, padding and all, and CLIP's
    pooled one."""

    way = f"flux-{FLUX_TOKENS}"

    def __init__(self, source: Source) -> None:
        super().__init__(
            source, [text_encoders.clip(source, "", projected=False), text_encoders.t5(source, "_2")]
        )

    @property
    def example(self) -> dict[str, Tensor]:
        clip, t5 = self.encoders
        return {
            "encoder_hidden_states": torch.zeros(1, FLUX_TOKENS, t5.width),
            "pooled_projections": torch.zeros(1, clip.width),
        }

    def _embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        (_, clip), (_, t5) = self.networks
        short, long = (
            self.tokens(number, prompts, longest, tell=number == 1).input_ids.to(self.device)
            for number, longest in enumerate((None, FLUX_TOKENS))
        )
        return {"encoder_hidden_states": t5(long)[0], "pooled_projections": clip(short).pooler_output}


def _check_lengths(prompts: Prompts) -> None:
    """Raises UserError for CLIP encoders of different lengths, whose embeddings do not lie side by side."""
    if len({one.length for one in prompts.encoders if one.length is not None}) > 1:
        raise UserError(f"{prompts.name} has text encoders of different lengths, which is not supported")
