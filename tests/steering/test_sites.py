"""Where sites are, and are not, in modules of other shapes than the engine's tests serve."""

import pytest
from torch import nn

from whipstaff.steering.sites import Kinds, SitesNotFound, find_layers


class Operator(nn.Module):
    """Attention's innermost part."""


class Projection(nn.Linear):
    """What takes the concatenated heads."""


class StateSpace(nn.Linear):
    """What mixes tokens without attention."""


KINDS = Kinds(
    is_attention=lambda module: isinstance(module, Operator),
    is_mixer=lambda module: isinstance(module, Operator | StateSpace),
    is_projection=lambda module: isinstance(module, Projection),
    is_linear=lambda module: isinstance(module, nn.Linear),
)


class Attention(nn.Module):
    def __init__(self, num_projections: int = 1) -> None:
        super().__init__()
        self.operator = Operator()
        self.out = nn.ModuleList() if num_projections == 0 else Projection(4, 4)
        if num_projections == 2:
            self.gate = Projection(4, 4)


class Block(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer, self.mlp = mixer, nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))


class MlpBlock(nn.Module):
    """As some hybrid models have them: nothing that mixes tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))


def model(*blocks: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Embedding(4, 4), nn.ModuleList(blocks), nn.LayerNorm(4))


def test_blocks_with_attention() -> None:
    layers = find_layers(model(Block(Attention()), Block(Attention())), KINDS)
    assert [layer.index for layer in layers] == [0, 1]
    assert all(isinstance(layer.output_projection, Projection) and layer.mlp_input for layer in layers)


def test_blocks_without_attention_show_what_they_have() -> None:
    blocks = [Block(StateSpace(4, 4)), Block(Attention()), MlpBlock()]
    state_space, attention, mlp = find_layers(model(*blocks), KINDS)
    assert state_space.attention is state_space.output_projection is mlp.attention is mlp.output_projection is None
    assert attention.attention is blocks[1].mixer and isinstance(attention.output_projection, Projection)
    assert [layer.mlp_input for layer in (state_space, attention)] == [block.mlp for block in blocks[:2]]
    assert mlp.mlp_input is mlp.mlp_output is blocks[2].mixer


class DoubleBlock(nn.Module):
    """As LongCat's: two of each, in lists that nobody calls."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(Attention() for _ in range(num))
        self.mlps = nn.ModuleList(nn.Linear(4, 4) for _ in range(num))


@pytest.mark.parametrize("num", [1, 2])
def test_what_a_block_has_twice_or_only_holds_is_no_site(num: int) -> None:
    (layer,) = find_layers(model(DoubleBlock(num)), KINDS)
    assert layer.attention is layer.output_projection is layer.mlp_input is layer.mlp_output is None


class BareBlock(nn.Module):
    """As Jamba's with attention: its parts are the block's own."""

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        if num_inputs == 2:
            self.gate = nn.Linear(4, 4)
        self.out, self.operator = Projection(4, 4), Operator()
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))


def test_a_block_that_is_the_attention_itself() -> None:
    """What the operator receives are queries, not what the attention does."""
    block = BareBlock(1)
    (layer,) = find_layers(model(block), KINDS)
    assert (layer.attention, layer.output_projection) == (block.qkv, block.out)
    assert layer.mlp_input is layer.mlp_output is block.mlp
    (layer,) = find_layers(model(BareBlock(2)), KINDS)
    assert layer.attention is None and layer.output_projection is not None and layer.mlp_input is not None


@pytest.mark.parametrize("num_projections", [0, 2])
def test_an_output_projection_is_the_only_one_that_could_be_it(num_projections: int) -> None:
    (layer,) = find_layers(model(Block(Attention(num_projections))), KINDS)
    assert layer.attention is not None and layer.output_projection is None


def test_a_model_that_mixes_no_tokens_cannot_be_steered() -> None:
    with pytest.raises(SitesNotFound, match="no list of blocks that mix tokens; it cannot be steered"):
        find_layers(model(MlpBlock()), KINDS)
