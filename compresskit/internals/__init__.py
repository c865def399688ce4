"""Private interfaces of libraries, one module each, with the version that each was checked with.

Nothing else in compresskit reads or sets a private name of a library, but for two classes that override private methods
of transformers: :class:`compresskit.model.quantizer.CompresskitHfQuantizer` (``_process_model_before_weight_loading``,
``_process_model_after_weight_loading``, ``_dequantize``) and :class:`compresskit.training.trainer.DistillationTrainer`
(``_get_num_items_in_batch``, ``_get_output_dir``, ``_save_checkpoint``). A new minor version of a library is tried here
first.
"""
