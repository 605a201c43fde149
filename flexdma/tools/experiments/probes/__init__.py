"""Probes: what is measured of a model besides its answers, at the evaluations of its training.

heat_map.py      needles by length and depth, and the memory for keys and values
gate_course.py   the parameters of gates, and what they select
by_token.py      answers computed token by token, which see no later token
"""

from flexdma.tools.experiments.probes.gate_course import GateCourse
from flexdma.tools.experiments.probes.heat_map import HeatMap
from flexdma.tools.experiments.probes.probe import Probe

__all__ = ["GateCourse", "HeatMap", "Probe"]
