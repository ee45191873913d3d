"""diffusers' own tests of single UNet and VAE blocks, with the weights that the seed makes and the slices they publish.

Input: Generator(0) draws hidden states (4, 32, 32, 32), then temb (4, 128) if the block takes one; Generator(1) draws
(4, 32, 32, 32) for the up blocks' residuals. The published slices are of output[0, -1, -3:, -3:], to 5e-3
(tests/models/unets/test_unet_2d_blocks.py). Cross-attention blocks get no encoder_hidden_states: self-attention.
"""

import torch
from diffusers.models.unets import unet_2d_blocks

UP, TEMB = {"prev_output_channel": 32, "out_channels": 32}, {"temb_channels": 128}
BLOCKS = {
    "DownBlock2D": ({"out_channels": 32} | TEMB,
                    [-.0232, -.9869, .8054, -.0637, -.1688, -1.4264, .4470, -1.3394, .0904]),
    "CrossAttnDownBlock2D": ({"out_channels": 32, "cross_attention_dim": 32} | TEMB,
                             [.2238, -.7396, -.2255, -.3829, .1925, 1.1665, .0603, -.7295, .1983]),
    "DownEncoderBlock2D": ({"out_channels": 32}, [1.1102, .5302, .4872, -.0023, -.8042, .0483, -.3489, -.5632, .7626]),
    "UNetMidBlock2D": (TEMB, [-.1062, 1.7248, .3494, 1.4569, -.0910, -1.2421, -.9984, .6736, 1.0028]),
    "UNetMidBlock2DCrossAttn": ({"cross_attention_dim": 32} | TEMB,
                                [.0187, 2.4220, .4484, 1.1203, -.6121, -1.5122, -.8270, .7851, 1.8335]),
    "UpBlock2D": (UP | TEMB, [-.2041, -.4165, -.3022, .0041, -.6628, -.7053, .1928, -.0325, .0523]),
    "CrossAttnUpBlock2D": (UP | {"cross_attention_dim": 32} | TEMB,
                           [-.1403, -.3515, -.0420, -.1425, .3167, .5094, -.2181, .5931, .5582]),
    "UpDecoderBlock2D": ({"out_channels": 32}, [.4404, .1998, -.9886, -.3320, -.3128, -.7034, -.6955, -.2338, -.3137]),
}


def blocks() -> dict[str, torch.Tensor]:
    """`<block>.weights.<key>` in f16, `<block>.slice` as computed from them and `<block>.published` as diffusers has it."""
    golden = {}
    for name, (options, published) in BLOCKS.items():
        generator = torch.manual_seed(0)
        inputs = {"hidden_states": torch.randn(4, 32, 32, 32, generator=generator)}
        if "temb_channels" in options:
            inputs["temb"] = torch.randn(4, 128, generator=generator)
        if name in ("UpBlock2D", "CrossAttnUpBlock2D"):
            residual = torch.randn(4, 32, 32, 32, generator=torch.manual_seed(1))
            inputs["res_hidden_states_tuple"] = (residual,)
        block = getattr(unet_2d_blocks, name)(in_channels=32, **options).eval()
        block.half().float()  # Stored as f16, in half the bytes.
        output = block(**inputs)
        output = output[0] if isinstance(output, tuple) else output
        computed, published = output[0, -1, -3:, -3:].flatten(), torch.tensor(published)
        assert (computed - published).abs().max() < 5e-3, (name, computed, published)
        golden |= {f"{name}.weights.{key}": value.half() for key, value in block.state_dict().items()}
        golden |= {f"{name}.slice": computed, f"{name}.published": published}
    return golden
