"""OpenVLA's and OpenVLA-OFT's own LIBERO evaluations, `run_libero_eval.py`, on the policies of this package, with two
lines at the top of the script:

    import vla_pruner.official
    vla_pruner.official.install(vla_pruner.VLAPruner(keep=0.25))

Everything else in the script stays as it is.
"""

from __future__ import annotations

from vla_pruner.official.evaluation import OfficialModel
from vla_pruner.official.installation import Installation, install
from vla_pruner.official.stand_ins import MissingName

__all__ = ["Installation", "MissingName", "OfficialModel", "install"]
