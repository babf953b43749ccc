"""One file per data source; every module here is imported when data is opened (see `batches.load_sources`)."""
