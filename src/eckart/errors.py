"""The exception tree. Each class knows its exit code, so the command line only prints and exits.

EckartError                 1  our own bug, unless a subclass says otherwise
├── UsageError              2  options: out of range, contradictory, output exists
│   ├── RankError           2  a rank below 1 or above min(m, n)
│   └── DependencyError     2  a package of an extra that is not installed
├── InputError              3  what was given is missing, empty, damaged or unsupported
│   ├── CheckpointError     3  a file or folder is not the checkpoint it should be
│   ├── ShapeError          3  not a non-empty matrix
│   ├── DtypeError          3  a number format no factorization exists for
│   └── NonFiniteError      3  NaN or Inf among the entries
├── FactorizationError      3  every method failed its own check on this matrix
├── BusyError               4  another run holds the work folder
├── StaleError              4  the work folder belongs to another request
├── StorageError            5  no space, no permission, no such device
├── ResourceError           5  not enough memory; a worker process that died
└── PromiseError            6  the result does not hold what its certificate says
    └── LossError           6  it would leave out what nobody has agreed to lose
"""


class EckartError(Exception):
    """Base of every error that eckart raises on purpose."""

    exit_code = 1


class UsageError(EckartError, ValueError):
    """The request itself is wrong: an option, a pattern, a path of the output."""

    exit_code = 2


class RankError(UsageError):
    """A rank below 1, or above min(m, n)."""


class DependencyError(UsageError, ImportError):
    """A package that only some commands need is not installed."""


class InputError(EckartError, ValueError):
    """What was given cannot be used."""

    exit_code = 3


class CheckpointError(InputError):
    """A file or folder is not the checkpoint it should be."""


class ShapeError(InputError):
    """Not a matrix, or an empty one."""


class DtypeError(InputError):
    """A number format that cannot be factored."""


class NonFiniteError(InputError):
    """NaN or Inf among the entries."""


class FactorizationError(EckartError, ArithmeticError):
    """Every rung of the ladder failed its own check."""

    exit_code = 3


class BusyError(EckartError):
    """Another run holds the work folder."""

    exit_code = 4


class StaleError(EckartError):
    """The work folder belongs to another request."""

    exit_code = 4


class StorageError(EckartError, OSError):
    """The file system refused: no space, no permission."""

    exit_code = 5


class ResourceError(EckartError):
    """The machine cannot do it: not enough memory, or a worker process that died of it."""

    exit_code = 5


class PromiseError(EckartError):
    """The result does not hold what its certificate says."""

    exit_code = 6


class LossError(PromiseError):
    """The result would leave out more than nothing, and nobody has agreed to lose it."""
