//! The formats of image files.

/// Extensions of the files that are read as images.
pub(super) const FORMATS: [&str; 4] = ["png", "jpg", "jpeg", "webp"];

/// Whether a file's name has the extension of an image.
pub(super) fn is_image(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, extension)| FORMATS.contains(&extension.to_lowercase().as_str()))
}
