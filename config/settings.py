"""One settings object: default.yaml < the user's YAML (MODERATO_CONFIG) < MODERATO_* in the environment.

A variable that ends in _FILE names a file with the value instead: a secret's.

Owns reading, checking and explaining settings. An unknown or wrong key stops the start: a worker that
silently ignored a misspelt threshold would moderate by a policy nobody wrote.
"""

import base64
import difflib
import hashlib
import ipaddress
import os
import re
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from config.files import read_bounded, yaml_trouble
from config.names import Action
from config.urls import check_broker_url, parse_database_url

ROOT = Path(__file__).resolve().parent.parent
"""The repository; relative paths in settings start here, wherever the command was run."""

PREFIX = "MODERATO_"
CONFIG_FILE_VARIABLE = "MODERATO_CONFIG"
VARIABLE_ORIGIN = "the variable "
SECRET_SUFFIX = "_FILE"
"""Of a variable that names the file a setting's value stands in: MODERATO_BROKER_URL_FILE=/run/secrets/broker_url."""
SECRET_ORIGIN = "the secret file "
SECRET_SETTINGS = ("broker_url", "database_url", "secret", "sentinel_password")
"""Whose values no message shows."""
MAX_SECRET_BYTES = 65_536
MAX_FILE_BYTES = 1_048_576
"""Of a file of settings."""
DEFAULT_FILE = ROOT / "config" / "default.yaml"
OWN_TEST_VARIABLES = frozenset({"MODERATO_TEST_DATABASE_URL"})
SERVICE_LINK = re.compile(r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)")
"""Kubernetes puts such variables, and NAME_PORT=tcp://…, into every pod of a namespace: for each of its Services."""
SENTINEL_TIMEOUT_S = 3
"""For a Sentinel to answer, after which the next is asked."""
HUB_PREFIX = "hub:"
"""Of a source of training rows that is a dataset of the Hugging Face hub, not a path."""


class SettingsError(Exception):
    """A setting that cannot be used; the message names the key, its value, where it stands and what is allowed."""


def _from_root(path: Path) -> Path:
    return path if path.is_absolute() else ROOT / path


def relative_to_root(value: Any) -> Any:
    """JSON values with the paths in them as one would write them in the repository, wherever that is."""
    if isinstance(value, str):
        return value.removeprefix(f"{ROOT}/")
    if isinstance(value, Mapping):
        return {key: relative_to_root(each) for key, each in value.items()}
    return [relative_to_root(each) for each in value] if isinstance(value, list) else value


def embedded_directory() -> Path:
    """Private directory of the embedded Redis' socket, the same for every command run from this checkout.

    Under /tmp because a socket's path ends at 107 characters, and a checkout's may be longer.
    """
    return Path("/tmp") / f"moderato-{os.getuid()}-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:10]}"


def _broker_url(value: str) -> str:
    if value == "embedded":
        return f"redis+socket://{embedded_directory() / 'redis.sock'}"
    check_broker_url(value)
    return value


def _database_url(value: str) -> str:
    url = parse_database_url(value)
    if url.drivername == "sqlite":
        url = url.set(database=str(_from_root(Path(url.database or ""))))
    return url.render_as_string(hide_password=False)


def _data_source(value: str) -> str:
    return value if value.startswith(HUB_PREFIX) else str(_from_root(Path(value)))


BrokerUrl = Annotated[str, AfterValidator(_broker_url)]
DatabaseUrl = Annotated[str, AfterValidator(_database_url)]
RootedPath = Annotated[Path, AfterValidator(_from_root)]
DataSource = Annotated[str, AfterValidator(_data_source)]
Label = Literal["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
PositiveWeights = Literal["none", "sqrt", "balanced"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BrokerOptions(Section):
    """See config/default.yaml."""

    global_keyprefix: str
    master_name: str = Field(min_length=1)
    sentinel_password: SecretStr

    def for_celery(self) -> dict[str, Any]:
        """The same as some of Celery's `broker_transport_options`, which hold the password as it is."""
        options: dict[str, Any] = {"global_keyprefix": self.global_keyprefix, "master_name": self.master_name}
        if password := self.sentinel_password.get_secret_value():
            # Whoever gives one option of these connections gives all: they lose the timeouts that Redis' have.
            timeouts = dict.fromkeys(("socket_connect_timeout", "socket_timeout"), SENTINEL_TIMEOUT_S)
            options["sentinel_kwargs"] = {"password": password, **timeouts}
        return options


class ClientSettings(Section):
    """See config/default.yaml for each setting's unit and reason."""

    durable: bool
    max_queue_messages: int = Field(ge=0)
    max_comments_per_minute: int = Field(ge=0)
    community_max_comments_per_minute: dict[str, Annotated[int, Field(ge=0)]]


class MetricsSettings(Section):
    """See config/default.yaml for each setting's unit and reason."""

    host: str = Field(min_length=1)
    worker_port: int = Field(ge=0, le=65_535)
    trainer_port: int = Field(ge=0, le=65_535)
    webhooks_port: int = Field(ge=0, le=65_535)


class EndpointSettings(Section):
    """See config/default.yaml for each setting's meaning."""

    allow_http: bool = False
    url: str
    """Checked with the one before it."""
    min_action: Action
    communities: list[str] = []
    timeout_s: float = Field(10, gt=0, le=60)
    include_text: bool = False
    secret: SecretStr | None = None
    """One or, while it is being changed, two with a space between them."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, value: str, info: ValidationInfo) -> str:
        expected = "expected a URL that begins with https:// or http:// and names a host"
        try:
            url = urlsplit(value)
            _ = url.port
        except ValueError:  # what it says may quote a password
            raise ValueError(expected) from None
        if url.scheme not in ("https", "http") or not url.hostname:
            raise ValueError(expected)
        if url.scheme == "http" and not info.data.get("allow_http") and not _is_this_machine(url.hostname):
            raise ValueError(
                "whoever is on the way could read and change what is posted by http://: use https://, or set "
                "allow_http where the network is yours"
            )
        return value

    @field_validator("secret")
    @classmethod
    def _check_secret(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None:
            keys = _signing_keys(secret.get_secret_value())
            if not 1 <= len(keys) <= 2 or not all(24 <= len(key) <= 64 for key in keys):
                raise ValueError(SECRET_FORM)
        return secret

    @property
    def signing_keys(self) -> list[bytes]:
        """Those that sign what is posted, each."""
        return [] if self.secret is None else _signing_keys(self.secret.get_secret_value())


SECRET_FORM = (
    "expected whsec_ and the base64 of 24 to 64 random bytes, as of `echo whsec_$(openssl rand -base64 32)`; "
    "or two of them with a space between"
)


def _signing_keys(secret: str) -> list[bytes]:
    try:
        return [base64.b64decode(each.removeprefix("whsec_"), validate=True) for each in secret.split()]
    except ValueError:
        return []


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


EndpointName = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
"""As a variable of the environment can name it."""


class WebhookSettings(Section):
    """See config/default.yaml for each setting's unit and reason."""

    endpoints: dict[EndpointName, EndpointSettings]
    max_attempts: int = Field(ge=1, le=1_000)
    keep_days: float = Field(gt=0, le=3_650)


class PrivacySettings(Section):
    """See config/default.yaml for each setting's unit and reason."""

    keep_text_days: float = Field(ge=0, le=36_500)


class TrialSettings(Section):
    """See config/default.yaml for each setting's unit and reason."""

    min_decisions: int = Field(ge=1)
    max_error_rate: float = Field(ge=0, le=1)
    max_mean_score_shift: float = Field(ge=0, le=1)
    max_action_share_shift: float = Field(ge=0, le=1)


class WorkerSettings(Section):
    """See config/default.yaml for each setting's unit and reason."""

    device: Literal["auto", "cpu", "cuda"]
    engine: Literal["auto", "onnx", "torch"]
    threads: int = Field(ge=0, le=1024)
    max_batch_tokens: int = Field(ge=0, le=4_194_304)
    window_tokens: int = Field(ge=0, le=67_108_864)
    reuse_texts: int = Field(ge=0, le=10_000_000)
    max_held_comments: int = Field(ge=0, le=1_000_000)
    max_held_bytes: int = Field(ge=0)
    visibility_timeout_s: int = Field(ge=3, le=3600)
    resubmit_after_s: float = Field(ge=1, le=86_400)
    activation_poll_s: float = Field(gt=0, le=60)


class TrainerSettings(Section):
    """See config/default.yaml for each setting's unit and reason."""

    encoder: str = Field(min_length=1)
    max_length: int = Field(ge=8, le=8192)
    train_files: list[DataSource]
    holdout_file: RootedPath
    columns: dict[Literal["comment_text", Label], str]
    positive_from: float = Field(gt=0, le=1)
    max_rows: int = Field(ge=0)
    max_holdout_rows: int = Field(ge=0)
    validation_share: float = Field(ge=0, lt=1)
    min_corrections: int = Field(ge=0)
    correction_repeats: int = Field(ge=1, le=100)
    evasion_share: float = Field(ge=0, le=10)
    synonym_share: float = Field(ge=0, le=10)
    positive_weights: PositiveWeights
    focal_gamma: float = Field(ge=0, le=10)
    oversample_share: float = Field(ge=0, le=0.5)
    epochs: float = Field(gt=0, le=100)
    batch_size: int = Field(ge=1, le=4096)
    gradient_accumulation: int = Field(ge=1, le=4096)
    learning_rate: float = Field(gt=0, le=1)
    lr_schedule: Literal["linear", "cosine"]
    warmup_ratio: float = Field(ge=0, lt=1)
    layer_lr_decay: float = Field(gt=0, le=1)
    weight_decay: float = Field(ge=0, le=1)
    max_grad_norm: float = Field(gt=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    gradient_checkpointing: bool
    evaluations_per_epoch: int = Field(ge=1, le=100)
    early_stopping_patience: int = Field(ge=0, le=1000)
    checkpoint_steps: int = Field(ge=0)
    report_to: list[str]
    seed: int = Field(ge=0, le=2**31 - 1)
    calibration: Literal["none", "temperature"]
    target_precision: float = Field(gt=0, lt=1)
    calibration_texts: int = Field(ge=8, le=4096)
    max_int8_auc_drop: float = Field(ge=0, le=1)
    max_label_auc_drop: float = Field(ge=0, le=1)
    max_mean_auc_drop: float = Field(ge=0, le=1)
    max_label_log_loss_rise: float = Field(ge=0)
    min_label_positives: int = Field(ge=1)
    max_evasion_auc_drop: float = Field(ge=0, le=1)
    max_bias_auc_drop: float = Field(ge=0, le=1)
    robustness_rows: int = Field(ge=0)


class Settings(Section):
    """Every setting, checked. `broker_url` and `database_url` may hold passwords: log `without_password(...)`."""

    broker_url: BrokerUrl = Field(repr=False)
    broker_options: BrokerOptions
    database_url: DatabaseUrl = Field(repr=False)
    versions_dir: RootedPath
    policy_file: RootedPath
    log_format: Literal["text", "json"]
    metrics: MetricsSettings
    client: ClientSettings
    webhooks: WebhookSettings
    worker: WorkerSettings
    trial: TrialSettings
    privacy: PrivacySettings
    trainer: TrainerSettings


@cache
def settings() -> Settings:
    """The settings of this process, read once.

    Raises:
        SettingsError: a file cannot be read, or a key or value is not allowed.
    """
    return load_settings(os.environ)


def trainer_settings(base: Settings, overrides: Mapping[str, Any], origin: str = "the request") -> TrainerSettings:
    """The trainer settings with some of them overridden for one run.

    Args:
        origin: where the overrides stand, for the message.

    Raises:
        SettingsError: an override is unknown or not allowed.
    """
    everything = base.model_dump()
    everything["trainer"] |= overrides
    try:
        return Settings.model_validate(everything).trainer
    except ValidationError as error:
        raise SettingsError(_explain(error, {("trainer", key): origin for key in overrides})) from None


def read_recipe(path: Path) -> dict[str, Any]:
    """Trainer settings in a YAML file of their own: by themselves, or in a section `trainer` as among all settings.

    Raises:
        SettingsError: the file cannot be read, or holds other sections beside `trainer`.
    """
    values, _ = _read_yaml(path)
    if "trainer" not in values:
        return values
    if len(values) > 1 or not isinstance(values["trainer"], dict):
        raise SettingsError(
            f"settings file {path} must hold a section trainer and nothing else, or the trainer's settings alone; "
            f"it holds {', '.join(map(str, values))}"
        )
    return values["trainer"]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What config/default.yaml says of one setting."""

    heading: str
    """Of the group that the setting is in."""
    reason: str
    default: str
    """As it is written there."""


def explanations(section: str) -> dict[str, Explanation]:
    """Of every setting of a section what the lines above it in config/default.yaml say."""
    _, _, after = DEFAULT_FILE.read_text(encoding="utf-8").partition(f"\n{section}:\n")
    explained = {}
    heading, comments = "", list[str]()
    for line in after.splitlines():
        if line and not line.startswith("  "):
            break
        if line.startswith("  # --- "):
            heading = line.removeprefix("  # --- ")
        elif line.startswith("  # "):
            comments.append(line.removeprefix("  # "))
        elif setting := re.match(r"  (\w+): (.*)", line):
            explained[setting[1]] = Explanation(heading, " ".join(comments), setting[2])
            comments = []
    return explained


def load_settings(environment: Mapping[str, str]) -> Settings:
    """Settings from default.yaml, the file that `environment` names, its MODERATO_* variables and their secret files.

    Raises:
        SettingsError: a file cannot be read, or a key or value is not allowed.
    """
    layers = [_read_yaml(DEFAULT_FILE)]
    if named := environment.get(CONFIG_FILE_VARIABLE):
        layers.append(_read_yaml(_from_root(Path(named))))
    secrets = secret_files(environment)
    layers += _from_environment(environment, secrets)
    layers += [_read_secret(variable, path) for variable, path in secrets.items()]

    merged: dict[str, Any] = {}
    origin: dict[tuple[str, ...], str] = {}
    for values, name in layers:
        _merge(values, into=merged, origin=origin, name=name, path=())
    for path, name in origin.items():
        if path[-1] == "secret" and not name.startswith((VARIABLE_ORIGIN, SECRET_ORIGIN)):
            variable = _variable(path)
            raise SettingsError(
                f"setting {'.'.join(path)} stands in {name}: a secret comes from the environment only, as {variable} "
                f"or by {variable}{SECRET_SUFFIX}; take it out of the file, and use another one from now on"
            )
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        raise SettingsError(_explain(error, origin)) from None


def without_password(url: str) -> str:
    """The URL as it may be shown: every password replaced by ***."""

    def hide(part: str) -> str:
        scheme, separator, rest = part.partition("://")
        userinfo, at, host = rest.rpartition("@")
        if not at or ":" not in userinfo:
            return part
        return f"{scheme}{separator}{userinfo.partition(':')[0]}:***@{host}"

    # A semicolon separates Sentinel's hosts, but may also stand in a password.
    shown = ";".join(map(hide, re.split(r";(?=[\w+]+://)", url)))
    return re.sub(r"([?&]\w*password=)[^&;'\"]*", r"\1***", shown)


def _read_yaml(path: Path) -> tuple[dict[str, Any], str]:
    try:
        values = yaml.safe_load(read_bounded(path, MAX_FILE_BYTES).decode())
    except OSError as error:
        raise SettingsError(f"settings file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the last two also of 2026-13-45 and of depth
        raise SettingsError(f"settings file {path} is not YAML: {yaml_trouble(error)}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise SettingsError(f"settings file {path} must hold `key: value` lines, not a {type(values).__name__}")
    return values, str(path)


def _from_environment(environment: Mapping[str, str], secrets: Collection[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """Of each variable the one setting it holds, with its sections around it."""
    plain = set()
    for variable, text in sorted(environment.items()):
        if not _is_ours(variable, text) or variable in secrets:
            continue
        path = _path(variable)
        for length in range(1, len(path)):
            if path[:length] in plain:
                section = ".".join(path[:length])
                raise SettingsError(f"{variable} in the environment needs a section {section}, which is a value there")
        # Lists and mappings are written as in YAML: MODERATO_TRAINER__TRAIN_FILES='[a.csv, b.csv]'. A brace alone does
        # not make a mapping: Redis' key prefixes may begin with one.
        try:
            value = yaml.safe_load(text) if re.fullmatch(r"\[.*|\{.*: .*\}", text, re.DOTALL) else text
        except yaml.YAMLError as error:
            raise SettingsError(
                f"{variable} in the environment is no list or mapping as in YAML: {yaml_trouble(error)}"
            ) from None
        if not isinstance(value, dict):
            plain.add(path)
        yield _nested(path, value), f"{VARIABLE_ORIGIN}{variable}"


def _nested(path: tuple[str, ...], value: Any) -> Any:
    for part in reversed(path):
        value = {part: value}
    return value


def _is_ours(variable: str, text: str) -> bool:
    if not variable.startswith(PREFIX) or variable == CONFIG_FILE_VARIABLE or variable in OWN_TEST_VARIABLES:
        return False
    from_kubernetes = SERVICE_LINK.fullmatch(variable) or (
        variable.endswith("_PORT") and re.match(r"(tcp|udp|sctp)://", text)
    )
    return not from_kubernetes or _is_setting(_path(variable))


def _path(variable: str) -> tuple[str, ...]:
    return tuple(variable.removeprefix(PREFIX).lower().split("__"))


def _variable(path: tuple[str, ...]) -> str:
    return f"{PREFIX}{'__'.join(path).upper()}"


def secret_files(environment: Mapping[str, str]) -> dict[str, Path]:
    """The files that variables name for a setting's value. MODERATO_POLICY_FILE is none: that is itself a setting."""
    found = {}
    for variable, path in sorted(environment.items()):
        if not _is_ours(variable, path) or not variable.endswith(SECRET_SUFFIX) or _is_setting(_path(variable)):
            continue
        if (value := variable.removesuffix(SECRET_SUFFIX)) in environment:
            raise SettingsError(f"{value} and {variable} are both set in the environment; unset one of them")
        if not path:
            raise SettingsError(f"{variable} is set in the environment and names no file; name one, or unset it")
        found[variable] = _from_root(Path(path))
    return found


def _read_secret(variable: str, path: Path) -> tuple[dict[str, Any], str]:
    """The one setting that a secret file holds, with its sections around it. The line's end is not part of it."""
    trouble = f"the file {path}, which {variable} names, "
    try:
        secret = read_bounded(path, MAX_SECRET_BYTES).decode().rstrip("\r\n")
    except OSError as error:
        hint = "is it the right one, and may whoever runs this read it?"
        raise SettingsError(f"{trouble}cannot be read: {error.strerror}; {hint}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{trouble}is not UTF-8 text") from None
    if not secret:
        raise SettingsError(f"{trouble}is empty; write the value into it, and nothing else")
    return _nested(_path(variable.removesuffix(SECRET_SUFFIX)), secret), f"{SECRET_ORIGIN}{path} ({variable})"


def _merge(
    values: Mapping[str, Any],
    *,
    into: dict[str, Any],
    origin: dict[tuple[str, ...], str],
    name: str,
    path: tuple[str, ...],
) -> None:
    for key, value in values.items():
        here = (*path, str(key))
        origin[here] = name
        if isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(value, into=into[key], origin=origin, name=name, path=here)
        else:
            into[key] = value


def _explain(error: ValidationError, origin: Mapping[tuple[str, ...], str]) -> str:
    lines = []
    for problem in error.errors():
        path = tuple(str(part) for part in problem["loc"])
        key = ".".join(path)
        where = next((origin[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origin), "the settings")
        if problem["type"] == "extra_forbidden":
            allowed = _keys_beside(path)
            near = difflib.get_close_matches(path[-1], allowed, n=1)
            if near and where == f"{VARIABLE_ORIGIN}{_variable(path)}":
                near = [_variable((*path[:-1], near[0]))]
            hint = f"did you mean {near[0]}? " if near else ""
            lines.append(f"unknown setting {key} in {where}; {hint}allowed here: {', '.join(allowed)}")
        elif problem["type"] == "missing":
            lines.append(
                f"setting {key} is missing; {where} sets others beside it"
            )  # what stands beside it may be a secret
        else:
            # A URL that cannot be parsed may hold a password anywhere, and whatever a secret file holds is one.
            is_secret = path[-1] in SECRET_SETTINGS or where.startswith(SECRET_ORIGIN)
            value = "***" if is_secret else without_password(repr(problem["input"]))
            lines.append(f"setting {key} = {value} in {where} is wrong: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(lines)


def _is_setting(path: tuple[str, ...]) -> bool:
    return path[-1] in _keys_beside(path)


def _keys_beside(path: tuple[str, ...]) -> list[str]:
    here: Any = Settings
    for part in path[:-1]:
        if isinstance(here, types.GenericAlias):  # a mapping: of sections perhaps, by names of the user's
            here = get_args(here)[-1]
        elif _has_settings(here) and part in here.model_fields:
            here = here.model_fields[part].annotation
        else:
            return []
    return sorted(here.model_fields) if _has_settings(here) else []


def _has_settings(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
