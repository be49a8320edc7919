"""The names of NeMo AutoModel's VLM data modules, for those who migrate: same modules, same signatures.

``nemo_automodel.components.datasets.vlm.X`` is ``lightning_vlm.automodel.X`` for ``samplers``, ``neat_packing_vlm``,
``collate_fns``, ``fake_image`` and ``pp_media``. They estimate lengths, as theirs do; `VLMDataModule(packing=True)`
measures them.
"""
