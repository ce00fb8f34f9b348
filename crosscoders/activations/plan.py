"""What a cache will hold, checked before a model loads: `make_plan` tokenises and hashes."""

from typing import Any, NamedTuple

from crosscoders.activations.settings import CacheConfig
from crosscoders.common import files
from crosscoders.common.progress import say
from crosscoders.models.limits import require_readable
from crosscoders.models.names import require_two_models
from crosscoders.models.pair import PairInfo, inspect_pair
from crosscoders.text.templates import writes_date
from crosscoders.text.tokens import Rows, read_template, tokenize_documents

FORMAT_VERSION = 1


class Plan(NamedTuple):
    info: PairInfo
    rows: Rows
    shared: dict[str, Any]
    """What decides the bytes of the cache at any hook point; `hook_point` only keeps its place among the keys."""

    def fingerprint(self, hook_point: str) -> dict[str, Any]:
        """Return everything that decides the bytes of the cache at that hook point."""
        return {**self.shared, "hook_point": hook_point}


def make_plan(config: CacheConfig) -> Plan:
    """Tokenise and check everything that can be wrong before a model loads."""
    names = [str(point.hook_point) for point in config.points()]
    info = inspect_pair(config.base, config.tuned, names, tokenizer=config.tokenizer)
    template = read_template(config.chat_template) or info.tokenizer.chat_template
    date = {"template_date": config.template_date} if writes_date(template) else {}
    if date:
        say(f"the chat template writes a date: {config.template_date} (--template-date), on whatever day this runs")
    rows = tokenize_documents(config.data_config(), info.tokenizer)
    require_readable(rows, info.models(), info.tokenizer)
    require_two_models(config.base, config.tuned)
    shared = {
        "format_version": FORMAT_VERSION,
        **info.hashes(),
        "template_hash": files.hash_json(template),
        **date,
        "token_hash": rows.token_hash(),
        "group_hash": files.hash_json(rows.group_names),
        "hook_point": None,
        "n_models": 2,
        "d_model": info.d_model,
        "dtype": config.dtype,
        "model_dtype": config.model_dtype,
        "max_norm_multiple": config.max_norm_multiple,
        "n_tokens": config.n_tokens,
        "shard_tokens": config.shard_tokens,
        "batch_rows": config.batch_rows,
    }
    return Plan(info, rows, shared)
