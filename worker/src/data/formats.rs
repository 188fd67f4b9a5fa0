//! The formats of image files.

use anyhow::ensure;
use image::{DynamicImage, ImageFormat};

/// Extensions of the files that are read as images.
pub(super) const FORMATS: [&str; 4] = ["png", "jpg", "jpeg", "webp"];

/// Decodes an image.
///
/// # Errors
/// It is none, is damaged, or is cut off; some decoders fill in what is missing.
pub(super) fn decoded(bytes: &[u8]) -> anyhow::Result<DynamicImage> {
    let whole = match image::guess_format(bytes) {
        // The mark of the end; programs may append what they like.
        Ok(ImageFormat::Jpeg) => bytes.windows(2).any(|pair| pair == [0xff, 0xd9]),
        Ok(ImageFormat::Png) => bytes.windows(4).any(|name| name == b"IEND"),
        Ok(ImageFormat::WebP) => {
            let length = bytes.get(4..8).and_then(|size| size.try_into().ok()).map_or(0, u32::from_le_bytes);
            bytes.len() >= length as usize + 8
        }
        _ => true,
    };
    let image = image::load_from_memory(bytes)?;
    ensure!(whole, "is cut off");
    ensure!(image.height() > 0 && image.width() > 0, "is empty");
    Ok(image)
}

/// Whether a file's name has the extension of an image.
pub(super) fn is_image(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, extension)| FORMATS.contains(&extension.to_lowercase().as_str()))
}
