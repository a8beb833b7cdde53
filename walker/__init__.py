"""The walker study: offline multi-task learning on dm_control walk and run."""
