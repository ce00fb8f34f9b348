"""Which chat template writes the chats, and what to do where there is none or more than one."""

from typing import Any

from crosscoders.common.errors import InputError


def require_template(tokenizer: Any, template: str | None) -> None:
    """Raise InputError unless `template` or the tokenizer's own one can write chats.

    A tokenizer may name several; the one called default is taken.
    """
    if template is not None:
        return
    own = tokenizer.chat_template
    if not own:
        raise InputError(
            "the data holds chats but neither model's tokenizer has a chat template. Give one: --chat-template FILE"
        )
    if isinstance(own, dict) and "default" not in own:
        raise InputError(
            f"the tokenizer has chat templates {', '.join(sorted(own))} and none called default. Save the one that "
            "the model was trained with to a file and give it: --chat-template FILE"
        )
