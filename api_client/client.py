"""What producers and moderators hold: submit comments, read decisions, correct them, retrain, choose the version.

Put together from its parts, a module each. Imports neither torch nor the model: tasks are sent by name.
"""

from api_client.connecting import BrokerUnavailable
from api_client.limits import QueueFull, RateLimited, TryLater
from api_client.messages import InvalidComment, SubmissionIds
from api_client.moderating import Moderator
from api_client.operating import Operator, RefusedByGate
from api_client.reading import Reader
from api_client.submitting import Producer
from api_client.waiting import SetAside, Verdict, WaitTimeout
from api_client.watching import Watcher
from config.queues import UnknownQueue
from db.activations import ActiveChanged, AlreadyRolledBack, NothingToRollBack

__all__ = [
    "ActiveChanged",
    "AlreadyRolledBack",
    "BrokerUnavailable",
    "InvalidComment",
    "ModerationClient",
    "NothingToRollBack",
    "QueueFull",
    "RateLimited",
    "RefusedByGate",
    "SetAside",
    "SubmissionIds",
    "TryLater",
    "UnknownQueue",
    "Verdict",
    "WaitTimeout",
]


class ModerationClient(Producer, Reader, Moderator, Operator, Watcher):
    """Speaks to the queue and the database. Connects when first used; one client may serve several threads.

    Every method may raise BrokerUnavailable or DatabaseProblem, where it uses the one or the other.
    """
