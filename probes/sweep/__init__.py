"""Sweeps: one family over a grid of settings and seeds, as a table that grows.

plan       a sweep as data: its grid, its points, which of them share a program; needs no JAX
work       a block of points: fitted in one program, measured, written as run directories
engines    where blocks are worked on: this process, several of this machine, Ray
results    the table, the figures and the page
command    the subcommand

Ray finds its machines by its own launchers. Under Slurm, `ray symmetric-run --address HEAD:6379 --
orrery sweep ... --ray auto` inside `srun`, one task a node, starts Ray on all of them and the
sweep on the first; on Kubernetes, the sweep is the `entrypoint` of a `RayJob` of KubeRay.
Every node needs this package; what workers make comes back to the driver's folder, which no other
machine has to see.
"""

from probes.sweep.plan import Sweep

__all__ = ["Sweep"]
