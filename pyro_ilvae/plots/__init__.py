"""Pictures of collapse with Matplotlib: each function draws into ``ax``, or into a new figure, and returns the axes.

Colors are Okabe and Ito's, which color-blind readers can tell apart, and markers or line styles repeat what a color
says. Legends stand beside the axes, where they cover no data; in a figure of your own, ``layout="constrained"`` makes
room for them. The functions change no global style, and nothing is shown before ``plt.show()``.

Tensors, arrays, nested lists and columns of data frames are drawn alike. What cannot be drawn is a ValueError or a
TypeError that names the argument, before a figure is made.
"""

from pyro_ilvae.plots.collapse import plot_divergence_bound, plot_epsilon_curve, plot_kl_per_dimension
from pyro_ilvae.plots.images import plot_class_samples, plot_images, plot_reconstructions, plot_traversals
from pyro_ilvae.plots.information import plot_guaranteed_information
from pyro_ilvae.plots.latent import plot_posteriors
from pyro_ilvae.plots.training import plot_sweep, plot_training

__all__ = [
    "plot_class_samples",
    "plot_divergence_bound",
    "plot_epsilon_curve",
    "plot_guaranteed_information",
    "plot_images",
    "plot_kl_per_dimension",
    "plot_posteriors",
    "plot_reconstructions",
    "plot_sweep",
    "plot_training",
    "plot_traversals",
]
