"""Whipstaff's own settings: flags before environment (WHIPSTAFF_*) before defaults. vLLM's flags are vLLM's."""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from whipstaff.steering.needs import Hook
from whipstaff.steering.shape import SITES
from whipstaff.steering.vector_file import MAX_BYTES

HOOKS = (*SITES, "attention")


class Settings(BaseSettings):
    """What `whipstaff serve` and `whipstaff doctor` take beside vLLM's flags."""

    model_config = SettingsConfigDict(env_prefix="WHIPSTAFF_", extra="forbid", frozen=True)

    aux: Annotated[dict[str, str], NoDecode] = Field(
        {}, description="NAME=MODEL, repeatable (comma-separated in WHIPSTAFF_AUX): an auxiliary model to load"
    )
    vectors: Annotated[list[Path], NoDecode] = Field(
        [], description="a vector file or a folder of them, repeatable (comma-separated in WHIPSTAFF_VECTORS)"
    )
    steering_slots: int | None = Field(
        None, gt=0, description="distinct steering configurations in use at once; more wait (default: --max-num-seqs)"
    )

    steering_sites: Annotated[list[Hook], NoDecode] = Field(
        [],
        description="a further site to hook, or attention, repeatable (comma-separated in WHIPSTAFF_STEERING_SITES); "
        "what the vectors need is hooked anyway",
    )
    max_dose: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="the largest edit allowed, relative to the activations that it edits",
    )
    dose_policy: Literal["refuse", "clamp"] = Field(
        "refuse", description="what happens to a larger one: refuse the request, or weaken it to --max-dose"
    )

    registry: Path | None = Field(
        None, description="a folder for vectors and presets that come over HTTP; made if there is none"
    )
    admin_key: SecretStr | None = Field(
        None, min_length=1, description="lets its holder change the registry; better in WHIPSTAFF_ADMIN_KEY"
    )
    keys: Path | None = Field(
        None,
        description="a file of keys and of what each may do, instead of --api-key and --admin-key; read again when it "
        "changes",
    )
    open_metrics: bool = Field(False, description="let everybody read /metrics, which --keys otherwise guards, too")
    audit_log: Path | None = Field(
        None, description="a file for changes of the registry and refused requests, a JSON object a line"
    )
    max_upload_bytes: int = Field(MAX_BYTES, gt=0, le=MAX_BYTES, description=f"the largest upload ({MAX_BYTES})")
    presets: Annotated[list[Path], NoDecode] = Field(
        [], description="a preset (.json) or a folder of them, repeatable (comma-separated in WHIPSTAFF_PRESETS)"
    )

    drain_timeout: float = Field(
        30,
        ge=0,
        allow_inf_nan=False,
        description="seconds that running answers have once the server is told to end, before they are cut (30)",
    )

    early_layers: Annotated[list[int] | Literal["all"] | None, NoDecode] = Field(
        None,
        description="which layers' streams methods such as dola may read: comma-separated, 0 for the embeddings and l "
        "for the output of the l-th block; or all, or none (default: all if that takes little memory)",
    )

    playground: bool = Field(True, description="serve the page at /, where requests can be tried in a browser")
    grafana_url: str | None = Field(
        None,
        max_length=2048,
        description="where Grafana shows this server, for a link among what the page says of health",
    )

    lookahead: bool = Field(
        False,
        description="let methods try tokens before one is chosen, such as kwd with a prefix_classifier; every running "
        "request gets room for one token more",
    )

    attention_rows: bool = Field(
        False,
        description="let methods read how much a token looks at those before it in the last layer, such as opera",
    )
    capture_layers: Annotated[list[int] | Literal["all"] | None, NoDecode] = Field(
        None,
        description="which layers' activations requests may read by `capture`: comma-separated, or all, or none "
        "(default: all if that takes little memory)",
    )
    max_capture_bytes: int = Field(
        1 << 28,
        ge=0,
        description=f"activations that requests read at once, all together, as float32; more wait ({1 << 28})",
    )
    attention_layers: Annotated[list[int] | Literal["all"], NoDecode] = Field(
        [],
        description="layers of which `capture` may tell what their heads look at: comma-separated, or all, or none "
        "(none)",
    )
    max_downloads: int = Field(
        64,
        ge=0,
        description="files of activations that are kept at once for clients who want to fetch them: see "
        "capture_format; 0: none (64)",
    )
    max_download_bytes: int = Field(
        1 << 28, ge=0, description=f"their size, all together, among the machine's temporary files ({1 << 28})"
    )
    download_seconds: float = Field(
        600, gt=0, allow_inf_nan=False, description="how long one is kept that nobody deletes (600)"
    )
    hidden_states: int = Field(
        0,
        ge=0,
        description="requests at once whose hidden states are kept, for contrastive_search; more wait their turn",
    )
    one_form: bool = Field(
        False,
        description="compile and capture the model once, with its sites, not a second time without them for steps in "
        "which nothing is edited: starts sooner, takes less memory, serves plain requests more slowly",
    )
    max_search_seqs: int | None = Field(
        None,
        gt=0,
        description="sequences that requests which search, such as beam_search, may have at once, all together "
        "(default: half of --max-num-seqs, but 5 where there are as many)",
    )

    @field_validator("early_layers", "capture_layers", "attention_layers", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        if not isinstance(value, str) or value in ("all", "none"):
            return [] if value == "none" else value
        parts = [part.strip() for part in value.split(",")]
        if wrong := [part for part in parts if not part.isdecimal()]:
            raise ValueError(f"{wrong[0]!r} is no layer; give numbers with commas between them, or all, or none")
        return sorted({int(part) for part in parts})

    @field_validator("aux", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        entries = value.split(",") if isinstance(value, str) else value
        if not isinstance(entries, list):
            return entries
        pairs: dict[str, str] = {}
        for entry in filter(None, entries):
            name, separator, model = entry.partition("=")
            if not separator or not name.replace("-", "_").isidentifier() or not model:
                raise ValueError(f"{entry!r} is not NAME=MODEL, with a name of letters, digits, - and _")
            if name in pairs:
                raise ValueError(f"two auxiliary models are called {name!r}")
            pairs[name] = model
        return pairs

    @field_validator("vectors", "presets", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        return [part for part in value.split(",") if part] if isinstance(value, str) else value

    @field_validator("steering_sites", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        names = cls._paths(value)
        if isinstance(names, list) and (unknown := [name for name in names if name not in HOOKS]):
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(HOOKS)}")
        return names

    @field_validator("grafana_url")
    @classmethod
    def _leads_somewhere(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        is_web = parts.scheme in ("http", "https") and bool(parts.hostname)
        if not is_web or parts.port == 0 or not url.isprintable() or " " in url:  # `port` raises where it is no number
            raise ValueError(f"{url!r} is no address that begins with http:// or https://")
        if "@" in parts.netloc:
            raise ValueError("it is told to everybody who may look at the server; leave the name and the password out")
        return url

    @field_validator("vectors", "presets")
    @classmethod
    def _exist(cls, paths: list[Path]) -> list[Path]:
        for path in paths:  # said now, not after the minute that loading a model may take
            if not path.exists():
                raise ValueError(f"{path}: no such file or folder")
        return paths

    @model_validator(mode="after")
    def _policy_has_a_limit(self) -> "Settings":
        if "dose_policy" in self.model_fields_set and self.max_dose is None:
            raise ValueError("--dose-policy says what happens beyond --max-dose, which is not given")
        return self

    @model_validator(mode="after")
    def _keys_have_one_place(self) -> "Settings":
        if self.keys is not None and self.admin_key is not None:
            raise ValueError("--keys says who administrates; leave out --admin-key")
        return self

    @model_validator(mode="after")
    def _registry_has_a_key(self) -> "Settings":
        if self.admin_key is not None and self.registry is None:
            raise ValueError("--admin-key lets the registry be changed; say where it is kept with --registry DIR")
        return self

    @staticmethod
    def add_flags(parser: ArgumentParser) -> None:
        group = parser.add_argument_group("whipstaff", "Whipstaff's own flags")
        for name, action, metavar in (
            ("aux", "append", "NAME=MODEL"),
            ("vectors", "append", "PATH"),
            ("steering_slots", "store", "N"),
            ("steering_sites", "append", "SITE"),
            ("max_dose", "store", "RATIO"),
            ("dose_policy", "store", "POLICY"),
            ("registry", "store", "DIR"),
            ("admin_key", "store", "KEY"),
            ("keys", "store", "FILE"),
            ("audit_log", "store", "FILE"),
            ("max_upload_bytes", "store", "N"),
            ("presets", "append", "PATH"),
            ("drain_timeout", "store", "SECONDS"),
            ("grafana_url", "store", "URL"),
            ("early_layers", "store", "LAYERS"),
            ("capture_layers", "store", "LAYERS"),
            ("max_capture_bytes", "store", "N"),
            ("attention_layers", "store", "LAYERS"),
            ("max_downloads", "store", "N"),
            ("max_download_bytes", "store", "N"),
            ("download_seconds", "store", "SECONDS"),
            ("hidden_states", "store", "N"),
            ("max_search_seqs", "store", "N"),
        ):
            flag = "--" + name.replace("_", "-")
            help_text = Settings.model_fields[name].description
            group.add_argument(flag, dest=f"whipstaff_{name}", action=action, metavar=metavar, help=help_text)
        for name in ("lookahead", "attention_rows", "one_form", "open_metrics", "playground"):
            flag = "--" + name.replace("_", "-")
            help_text = Settings.model_fields[name].description
            group.add_argument(flag, dest=f"whipstaff_{name}", action=BooleanOptionalAction, help=help_text)

    @staticmethod
    def from_args(args: Namespace) -> "Settings":
        """Flags that were given win over the environment; the key is taken out of `args`, which vLLM logs.

        Raises: ValidationError.
        """
        given = {name: getattr(args, f"whipstaff_{name}") for name in Settings.model_fields}
        args.whipstaff_admin_key = None
        return Settings(**{name: value for name, value in given.items() if value is not None})
