"""What is wrong with settings and chats once the base model is known: said before anything is trained."""

from collections.abc import Mapping, Sequence

from router_training.data import Chat
from router_training.encoding import encode_chats
from router_training.mixing import check_longest
from router_training.roster import Roster
from router_training.settings import TrainingConfig
from server.errors import ConfigError
from server.model.loader import LoadedModel


def check_layers(settings: TrainingConfig, num_layers: int) -> None:
    """Raises ConfigError where no layer would have a gate."""
    if settings.routed_from_layer >= num_layers:
        raise ConfigError(
            f"routed_from_layer is {settings.routed_from_layer}, and the base model's {num_layers} layers count from 0"
        )


def check_lengths(
    train: Mapping[str, Sequence[Chat]], labels: Mapping[str, int], loaded: LoadedModel, settings: TrainingConfig
) -> None:
    """Where too long chats are refused: all of them, drawn for the mix or not, so that no seed decides what is good
    data. Raises TrainingDataError with file and line of each."""
    if settings.too_long == "refuse":
        chats = [chat for rows in train.values() for chat in rows]
        encode_chats(
            chats, labels, loaded.tokenizer, loaded.eos_token_ids, max_length=settings.max_length, too_long="refuse"
        )


def check_held_out(roster: Roster, validation: Mapping[str, Sequence[Chat]]) -> None:
    """Raises TrainingDataError for validation chats that cannot be evaluated, with file and line of each."""
    loaded = roster.loaded
    chats = [chat for rows in validation.values() for chat in rows]
    sequences = encode_chats(chats, roster.label_of_task, loaded.tokenizer, loaded.eos_token_ids)
    check_longest(sequences, loaded.max_model_len, chats)
