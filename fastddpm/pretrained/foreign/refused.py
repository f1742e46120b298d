"""The formats that are not read, with the reason and the way round."""

from typing import NamedTuple


class Refused(NamedTuple):
    """A format that is not read: a pattern that names of its tensors match, why, and the way round."""

    pattern: str
    reason: str
    way_round: str


REFUSED: dict[str, Refused] = {
    "lucidrains": Refused(
        r"(?:model/|ema/)?(?:ema_model\.|online_model\.)?(?:model\.)?init_conv\.weight",
        "denoising-diffusion-pytorch has another network (a 7x7 first convolution, RMSNorm, linear attention)",
        "load it with its own package, and give the network to fastddpm.Sampler, which takes networks of your own",
    ),
    "EDM": Refused(
        r"(?:ema/|net/)?model\.(?:enc|dec)\..*",
        "EDM has another network, conditioned on the noise's standard deviation, in pickles that hold program code",
        "draw images in its own environment: python generate.py --network=FILE.pkl --outdir=DIRECTORY",
    ),
    "latent diffusion": Refused(
        r"(?:state_dict/)?(?:model\.diffusion_model|first_stage_model)\..*",
        "it is a latent diffusion model, whose network sees an autoencoder's features and not images",
        "draw images with diffusers",
    ),
}
