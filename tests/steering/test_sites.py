"""Where sites are, and are not, in modules of other shapes than the engine's tests serve."""

import pytest
from torch import nn

from whipstaff.steering.sites import Kinds, SitesNotFound, find_layers


class Operator(nn.Module):
    """Attention's innermost part."""


class Projection(nn.Linear):
    """What takes the concatenated heads."""


KINDS = Kinds(
    is_attention=lambda module: isinstance(module, Operator),
    is_projection=lambda module: isinstance(module, Projection),
    is_linear=lambda module: isinstance(module, nn.Linear),
)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.operator, self.out = Operator(), Projection(4, 4)


class Block(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer, self.mlp = mixer, nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))


def model(*mixers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.ModuleList(map(Block, mixers)))


def test_blocks_with_attention() -> None:
    layers = find_layers(model(Attention(), Attention()), KINDS)
    assert [layer.index for layer in layers] == [0, 1]
    assert all(isinstance(layer.output_projection, Projection) and layer.mlp_input for layer in layers)


@pytest.mark.parametrize(
    ("mixers", "message"),
    [
        ([nn.Linear(4, 4)], "no list of blocks with attention; it cannot be steered"),  # a state-space model
        ([Attention(), nn.Linear(4, 4)], "layer 1: Block has no attention; hybrid models cannot be steered"),
    ],
)
def test_models_that_cannot_be_steered_say_so(mixers: list[nn.Module], message: str) -> None:
    with pytest.raises(SitesNotFound, match=message):
        find_layers(model(*mixers), KINDS)
