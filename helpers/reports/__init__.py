"""What a user looks at: figures, the report, the review page, TensorBoard. Nothing here decides a result."""
