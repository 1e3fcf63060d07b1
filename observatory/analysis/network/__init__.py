"""Time of exchanges: the network model, and the cost of realistic compared with mock traffic."""

from observatory.analysis.network.fitting import fit_network
from observatory.analysis.network.network import NetworkModel, load_network
from observatory.analysis.network.predict import Prediction, predict_us
from observatory.analysis.network.realism import realism

__all__ = ["NetworkModel", "Prediction", "fit_network", "load_network", "predict_us", "realism"]
