r"""ZO-AE-DS: make somebody else's classifier certifiably robust by asking it questions, and nothing more.

Yimeng Zhang, Yuguang Yao, Jinghan Jia, Jinfeng Yi, Mingyi Hong, Shiyu Chang, Sijia Liu, "How to Robustify Black-Box ML
Models? A Zeroth-Order Optimization Perspective", ICLR 2022, arXiv:2203.14195.

The owner of a model f shows scores for inputs: no weights, no gradients. A denoiser D in front of it is trained by
gradients that are estimated from queries, and the whole is certified by randomised smoothing. Estimates get worse with
the dimension in which they are made, so an encoder psi brings the image down to a few numbers z, and a decoder phi,
which counts as part of the black box, brings it back: ``f(phi(psi(D(x))))``.

- the black box, its counter and budget -> :class:`BlackBox`; from files, services, functions -> :func:`black_box`
- f(D(x)) (ZO-DS) -> :class:`Denoised`; f(phi(psi(D(x)))) (ZO-AE-DS) -> :class:`AutoencodedDenoised`
- auto-encoders -> :class:`Autoencoder`; the paper's -> :func:`paper_autoencoder`; of any size ->
  :func:`conv_autoencoder`; their training -> ``DenoisingMSE(0.0)``
- estimates of the gradient (RGE, CGE) -> ``robust_core.zeroth_order``
- the objective ``E CE(f(phi(psi(D(x + noise)))), argmax f(x))`` by queries -> :class:`QueryStability`; by gradients,
  where the model is open (FO-DS, FO-AE-DS) -> :class:`FrontStability`
- the second application, a black box that reconstructs images -> ``QueryStability(task="reconstruction")``; the attack
  that it is judged by -> :class:`ReconstructionAttack`
- certificates -> ``robust_core.certificates.Smoothing`` on the whole: the promise is about D, psi, phi and f together

::

    box = black_box("onnx:classifier.onnx", max_queries=10_000_000)
    autoencoder = conv_autoencoder((1, 28, 28), latent=24)
    fit(autoencoder, data, DenoisingMSE(0.0), epochs=20)
    model = AutoencodedDenoised(DnCNN(1), autoencoder, box)
    fit(model, data, QueryStability(sigma=0.25), epochs=8, checkpoint="run")
    certificate = Smoothing(model.eval(), 0.25).certify(x)

Queries for each image and step: q + 1 with q random directions, 2 d with coordinates (d + 1 one-sided), d = numbers
in z; and once for each image its own answer. The accuracy of f behind the auto-encoder on clean images is the ceiling.

Left out: training that starts from a pre-trained denoiser by default (the paper found it a trap; load one if you have
it), black boxes that answer labels alone (differences of labels are 0 almost everywhere; they can be certified, not
trained against). Defaults are the paper's: spread 0.005, 192 directions, central coordinates as in the released code,
which the paper writes one-sided. Reconstructed: the auto-encoders for 28 x 28 and 96 x 96 images, of which only the
size of z is published.
"""

from vision_robust.certified.denoised_smoothing import Denoised, DenoisingMSE, DnCNN
from vision_robust.certified.zo_ae_ds.autoencoder import (
    AutoencodedDenoised,
    Autoencoder,
    conv_autoencoder,
    paper_autoencoder,
)
from vision_robust.certified.zo_ae_ds.objective import FrontStability, QueryStability
from vision_robust.certified.zo_ae_ds.reconstruction import ReconstructionAttack
from vision_robust.models.black_box import BlackBox, QueryBudgetExceeded
from vision_robust.models.queries import HttpQuery, OnnxQuery, QueryError, black_box

__all__ = [
    "AutoencodedDenoised",
    "Autoencoder",
    "BlackBox",
    "Denoised",
    "DenoisingMSE",
    "DnCNN",
    "FrontStability",
    "HttpQuery",
    "OnnxQuery",
    "QueryBudgetExceeded",
    "QueryError",
    "QueryStability",
    "ReconstructionAttack",
    "black_box",
    "conv_autoencoder",
    "paper_autoencoder",
]
