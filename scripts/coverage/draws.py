"""Random tensors in the sizes that a config asks for."""

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from scripts.coverage.reading import first, nearest
from scripts.coverage.sizes import FIRST_SPECIAL, HIDDEN, VOCAB


class Draws:
    """Random tensors for one model, from a generator of their own, and the sizes that they have.

    Attributes:
        config: the model's config.
        hidden: hidden size.
        vocab: number of ordinary tokens.
        channels: of an image.
        size: height and width of an image, in pixels.
        mels: mel bands of a spectrogram.
    """

    def __init__(self, config: PreTrainedConfig, seed: int):
        self.config = config
        self._generator = torch.Generator().manual_seed(seed)
        self.hidden = first(nearest(config, "hidden_size", "d_model", "embed_dim", "dim", default=HIDDEN))
        self.vocab = min(first(nearest(config, "vocab_size", default=VOCAB)), FIRST_SPECIAL)
        self.channels = nearest(config, "num_channels", "in_channels", "in_chans", default=3)
        self.channels = self.channels if isinstance(self.channels, int) else 3
        size = nearest(config, "image_size", default=64)
        size = [size["height"], size["width"]] if isinstance(size, dict) else size
        self.size = tuple(size)[-2:] if isinstance(size, (list, tuple)) and len(size) > 1 else (first(size),) * 2
        self.mels = nearest(
            config, "num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim", "n_mels", default=16
        )

    def randn(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, generator=self._generator)

    def ids(self, length: int, batch: int = 2) -> Tensor:
        """Ordinary tokens, (batch, length)."""
        return torch.randint(4, max(self.vocab, 8), (batch, length), generator=self._generator)

    def flat_patches(self) -> list[Tensor]:
        """Patches of one image in the layouts of Qwen2-VL and its heirs, (patches, channels · time · patch²) first."""
        patch = first(nearest(self.config, "patch_size", default=8))
        time = nearest(self.config, "temporal_patch_size", default=1)
        return [
            self.randn(16, self.channels * time * patch**2),
            self.randn(16, self.channels * patch**2),
            self.randn(16, self.channels * 2 * patch**2),
            self.randn(16, self.channels, patch, patch),
            self.randn(1, 16, self.channels, patch, patch),
        ]
