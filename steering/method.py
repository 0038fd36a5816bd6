"""What a steering method is: a name, a paper, parameters, the tensors its files hold, and the edits they make."""

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from torch import Tensor

from whipstaff.steering.ops import EditOp
from whipstaff.steering.shape import ModelShape, Site
from whipstaff.steering.where import Shorthand, Where

if TYPE_CHECKING:  # both know of methods
    from whipstaff.steering.kinds.kind import Kind
    from whipstaff.steering.served import ModuleAbilities

MAX_SCALE = 1e4
Tensors = Mapping[str, Tensor]  # part -> float32 tensor, in the shape of the file


class EditParams(BaseModel):
    """What a request may say about a vector, whatever its method. A method's own parameters extend this."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def strength(default: float) -> Any:
    """The field `scale`, with the default of the method's paper."""
    return Field(
        default,
        ge=-MAX_SCALE,
        le=MAX_SCALE,
        allow_inf_nan=False,
        validation_alias=AliasChoices("scale", "strength", "coefficient"),
        description="strength; 0 is exactly off",
    )


class Scaled(EditParams):
    """Parameters of a method with a strength."""

    scale: float = strength(1.0)


class HookPoint(NamedTuple):
    """Where an edit is made."""

    site: Site
    layer: int  # 0-based block index

    @property
    def canonical(self) -> "HookPoint":
        """The stream entering a block is the one that leaves the block before it."""
        if self.site == "resid_pre" and self.layer > 0:
            return HookPoint("resid_post", self.layer - 1)
        return self

    @staticmethod
    def entering(layer: int) -> "HookPoint":
        """Where the stream that enters a block is found: 0 is what the embedding gives, l what leaves the l-th."""
        return HookPoint("resid_pre", layer).canonical


class Trial(NamedTuple):
    """One thing to try in the self-test."""

    what: str
    setting: Mapping[str, Any]  # the method's parameters, which must change what the model says


P = TypeVar("P", bound=EditParams)
S = TypeVar("S", bound=Scaled)
Combining = Literal["never", "directions", "alike", "added"]


class Method(ABC, Generic[P]):
    """One way of steering. Adding a method is a file in `methods/` and a line in its table.

    Files name their tensors `{site}.{layer}.{part}`, or `{part}` alone for what is the same at all of `hook_points`.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    params: ClassVar[type[EditParams]]
    sites: ClassVar[tuple[Site, ...]]
    where: ClassVar[Shorthand]  # the paper's own choice of tokens
    kind: ClassVar["Kind"]  # what makes it happen
    needs_file: ClassVar[bool] = True  # if not, a request may name the method instead of a vector
    off: ClassVar[Mapping[str, Any]]  # parameters that leave the model alone, bit for bit; empty if there are none
    parts: ClassVar[Mapping[str, tuple[str, ...]]]
    """Part -> its shape in symbols: `width` (of the site; `heads, head_dim` at attn_head), `hidden`, `heads`,
    `head_dim`, `experts`, and free names such as `rank`, which agree at one hook point. A name that ends in `?` says
    that the part may be absent."""

    example: ClassVar[Mapping[str, Any]] = {}  # parameters that a request has to say, where files need not

    combines: ClassVar[Combining] = "never"
    """Whether files of it can be summed (see `algebra`): never; only as directions, of which the strength is no factor;
    with files of the same method; or with all that keep `add` and `gain`, since they are plain vectors."""

    def is_off(self, params: P) -> bool:
        """Whether an entry with these parameters leaves the model alone, bit for bit."""
        return False

    def hook_points(self, model: ModelShape) -> list[HookPoint]:
        """Where parts without a hook point of their own apply."""
        return []

    def check(self, tensors: Tensors, point: HookPoint, model: ModelShape) -> None:
        """Checks on a file beyond names, shapes and finite numbers. Raises: SteeringError."""
        return None

    def check_params(self, params: P, tensors: Mapping[HookPoint, Tensors]) -> None:
        """Checks of a request's parameters against a file. Raises: SteeringError naming the field."""
        return None

    def check_defaults(self, tensors: Tensors, defaults: Mapping[str, Any]) -> None:
        """Checks of the parameters that a file states against its numbers. Raises: SteeringError."""
        return None

    def check_file(self, params: P, defaults: Mapping[str, Any]) -> None:
        """Checks of a request's parameters against those that the file states. Raises: SteeringError."""
        return None

    def check_model(self, params: P, model: ModelShape) -> None:
        """Checks of parameters that name layers, heads or experts. Raises: SteeringError naming the field."""
        return None

    def own_where(self, tensors: Mapping[HookPoint, Tensors]) -> Where | None:
        """The tokens that it is for whatever a request says; None where a request may choose."""
        return None

    def linear_parts(self, tensors: Tensors) -> Tensors:
        """The numbers of one hook point in which the edit is linear."""
        return tensors

    def check_linear(self, defaults: Mapping[str, Any]) -> None:
        """Raises: SteeringError where the parameters that a file states make its edit one that is not linear."""
        return None

    def trials(self, abilities: "ModuleAbilities") -> Iterator[Trial]:
        """What shows, on any model, that the engine obeys; for methods that need no file."""
        yield from ()

    def encoder_size(self, tensors: Tensors, defaults: Mapping[str, Any]) -> int:
        """How many readings decide together which of them are active (see `ops.TopK`); 0 for most methods."""
        return 0

    def ops(self, tensors: Tensors, params: P, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        """The edits of activations at one hook point, applied in order."""
        return ()

    def spread(self, params: P, tensors: Mapping[HookPoint, Tensors], where: Where) -> Iterator[tuple[P, Where]]:
        """The edit as one or more, each with its own tokens; most methods make one."""
        yield params, where
