"""The DiTi model: encoder, partition and shift decoder against a frozen backbone.

Letters: B batch, C channels, H height, W width, D = latent_dim, K subsets, T time-steps.
"""

import torch
from torch import Tensor, nn

from configs.task import DitiTask
from pretrain.copied_tail import TailPass
from pretrain.encoder import make_encoder
from pretrain.frozen import Frozen
from pretrain.noise_schedule import Prediction, ddpm_schedule, steps_of_same_noise
from pretrain.objective import conditions, diti_loss, shifted_estimate
from pretrain.partition import make_partition
from pretrain.shift_decoder import FrozenPass
from pretrain.step_clock import Clock, untimed
from pretrain.timesteps import timestep_distribution


class DiTi(nn.Module):
    """Images to one loss each; also the pieces that export and evaluation use.

    Its parameters and its state are what training changes; the frozen backbone is beside them, in
    `decoder.trunk`.

    Raises:
        ValueError: the partition and the backbone's schedule, or the image sizes, do not agree.
    """

    def __init__(self, task: DitiTask, backbone: Frozen, *, image_size_px: int) -> None:
        super().__init__()
        self.task = task
        self.image_size_px = image_size_px
        self.partition = make_partition(task.partition, task.encoder.latent_dim)
        self.prediction: Prediction = backbone.prediction
        with torch.device("cpu"):  # tables hold numbers, also beside weights that have none
            self.schedule = backbone.noise_schedule
            self._check(backbone, image_size_px)
            self.timesteps = timestep_distribution(task.timesteps, self.schedule)
            self.masks = self.partition.masks(self._ddpm_steps())
        self._check_every_subset_is_taught()
        self.latents = backbone.latents
        self.encoder = make_encoder(
            task.encoder, image_size_px=image_size_px, dim_ends=self.partition.dim_ends
        )
        self.decoder = backbone.make_decoder(task.encoder.latent_dim)
        self.clock: Clock = untimed

    @property
    def frozen(self) -> list[nn.Module]:
        """All that is not trained: the backbone, and what makes its latents."""
        return [self.decoder.trunk, *([self.latents.vae] if self.latents else [])]

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """Of what noise is added to."""
        if self.latents is None:
            return 3, self.image_size_px, self.image_size_px
        side = self.image_size_px // self.latents.factor
        return self.latents.channels, side, side

    def _ddpm_steps(self) -> Tensor:
        """Partitions are written in steps of the DDPM's schedule, and lie where the noise does."""
        return steps_of_same_noise(self.schedule, ddpm_schedule(self.schedule.num_timesteps))

    def _check(self, backbone: Frozen, image_size_px: int) -> None:
        if self.partition.num_timesteps != self.schedule.num_timesteps:
            raise ValueError(
                f"task.partition must end at the backbone's "
                f"{self.schedule.num_timesteps} time-steps, got {self.partition.num_timesteps}"
            )
        if backbone.image_size_px != image_size_px:
            raise ValueError(
                f"data.image_size_px is {image_size_px}, but the backbone was trained on "
                f"{backbone.image_size_px} px images; use that size"
            )

    def _check_every_subset_is_taught(self) -> None:
        """Time-steps teach the subsets up to their own, in `stop_grad` their own only."""
        subset_of_T = self.masks.subset_T.numpy()
        for number, subset in enumerate(self.partition.subsets):
            start, own_end = subset.timesteps
            only_own = self.task.mode == "stop_grad"
            teaches_T = subset_of_T == number if only_own else subset_of_T >= number
            if not self.timesteps.probability_T[teaches_T].any():
                raise ValueError(
                    f"task.timesteps never teach subset {subset.name} (time-steps {start} to "
                    f"{own_end}): its {subset.dims[1] - subset.dims[0]} dimensions would stay "
                    f"untrained. Train on its time-steps too, or join it with the one before."
                )

    def tables_to(self, device: torch.device) -> None:
        """Move schedule and masks. They are no buffers, so that no engine casts them to bf16."""
        self.schedule, self.masks = self.schedule.to(device), self.masks.to(device)

    def to_latents(self, images_BCHW: Tensor) -> Tensor:
        """What noise is added to: the images themselves, or their latents."""
        return images_BCHW if self.latents is None else self.latents.encode(images_BCHW)

    def estimates(self, xt_BCHW: Tensor, t_B: Tensor, *z_BD: Tensor) -> tuple[Tensor, ...]:
        """Noise estimates of the backbone alone, then of DiTi given each z, from x_t; all BCHW.

        DiTi's sees the subsets of z up to t's own, in sampling as in training.
        """
        frozen = self.decoder.look(xt_BCHW, t_B)
        epsilon = self._epsilon(frozen, xt_BCHW, t_B)
        shown = [conditions(self.masks, "base", z, t_B)[0] for z in z_BD]
        shifts = [self.decoder(frozen, condition) for condition in shown]
        return epsilon, *(shifted_estimate(self.schedule, t_B, epsilon, s) for s in shifts)

    def epsilon_and_shift(
        self, xt_BCHW: Tensor, t_B: Tensor, condition_BD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The backbone's noise estimate and the shift G, from x_t and a masked z; both BCHW."""
        frozen = self.decoder.look(xt_BCHW, t_B)
        return self._epsilon(frozen, xt_BCHW, t_B), self.decoder(frozen, condition_BD)

    def forward(
        self,
        x0_BCHW: Tensor,
        t_B: Tensor,
        noise_BCHW: Tensor,
        latents_BCHW: Tensor | None = None,
        *caption: Tensor,
    ) -> Tensor:
        """Loss of each sample in the task's mode; float32 (B,).

        Args:
            x0_BCHW: images in [-1, 1].
            noise_BCHW: of `noise_shape`.
            latents_BCHW: of the images, where they were made beforehand.
            caption: embeddings of theirs, if that is what the backbone is told.
        """
        latents = self.to_latents(x0_BCHW) if latents_BCHW is None else latents_BCHW
        xt = self.schedule.add_noise(latents, t_B, noise_BCHW)
        with self.clock("backbone forward"):
            frozen = self.decoder.look(xt, t_B, *caption)
            epsilon = self._epsilon(frozen, xt, t_B)
        z = self.encoder(x0_BCHW)
        losses = [
            diti_loss(
                self.schedule,
                t_B=t_B,
                noise_BCHW=noise_BCHW,
                epsilon_BCHW=epsilon,
                shift_BCHW=self.decoder(frozen, condition),
                weight=self.task.weight,
                snr_gamma=self.task.snr_gamma,
                min_snr_cap=self.task.min_snr_cap,
            )
            for condition in conditions(self.masks, self.task.mode, z, t_B)
        ]
        return torch.stack(losses).sum(dim=0)

    def _epsilon(self, frozen: FrozenPass | TailPass, xt_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return self.schedule.epsilon_of(frozen.output_BCHW, self.prediction, xt_BCHW, t_B)
