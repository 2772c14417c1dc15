"""What a run tells while it trains: metrics, W&B, TensorBoard, progress, figures, health."""
