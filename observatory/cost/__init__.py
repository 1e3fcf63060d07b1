"""What things cost in time: the network model, and what realistic traffic costs beside mock traffic."""

from observatory.cost.fitting import fit_network
from observatory.cost.network import NetworkModel, load_network
from observatory.cost.predict import Prediction, predict_us
from observatory.cost.realism import realism

__all__ = ["NetworkModel", "Prediction", "fit_network", "load_network", "predict_us", "realism"]
