"""The unit of work mapped over tasks: here, or in worker processes. Knows no unit by name."""

from eckart.execute.local import Task as Task
from eckart.execute.local import Workers as Workers
from eckart.execute.local import warm_up as warm_up
from eckart.execute.machine import collect_rarely as collect_rarely
from eckart.execute.machine import cores as cores
from eckart.execute.machine import free_in_process as free_in_process
from eckart.execute.machine import free_memory as free_memory
from eckart.execute.machine import keep_freed_memory as keep_freed_memory
from eckart.execute.machine import workers_for as workers_for
from eckart.execute.progress import Progress as Progress
from eckart.execute.progress import Silent as Silent
