"""What a folder that compresskit wrote holds: records, recipe, model card; how it is verified and published."""
