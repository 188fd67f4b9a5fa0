//! `curves.png`: the curves of a run. FID over images seen above, both losses below.
//!
//! The font is part of the program, so a machine without fonts draws the same picture. Everything is drawn larger and
//! scaled down, which smooths the lines.

use std::{fmt::Display, io::Cursor, ops::Range, sync::OnceLock};

use image::{ImageFormat, RgbImage, imageops};
use plotters::{
    coord::{
        Shift,
        ranged1d::{KeyPointHint, NoDefaultFormatting, ValueFormatter},
        types::RangedCoordf64,
    },
    prelude::*,
    style::{FontStyle, register_font, text_anchor},
};

use potstill_proto::scores::Subject;

use super::{metrics::Metrics, number::short};

/// Width and height of the picture in pixels.
const SIZE: (u32, u32) = (1200, 960);
/// How much larger it is drawn.
const SCALE: u32 = 3;
const FONT: &str = "sans-serif";

const STUDENT: RGBColor = RGBColor(0x1f, 0x5f, 0xbf);
const TEACHER: RGBColor = RGBColor(0xc8, 0x4b, 0x11);
const FAKE_SCORE: RGBColor = RGBColor(0x0b, 0x84, 0x6b);
const GENERATOR: RGBColor = RGBColor(0x8e, 0x3b, 0xa8);
const TEXT: RGBColor = RGBColor(0x22, 0x26, 0x2b);
const AXIS: RGBColor = RGBColor(0x8a, 0x90, 0x98);
const GRID: RGBColor = RGBColor(0xe4, 0xe7, 0xeb);

/// The picture could not be drawn.
#[derive(Debug, thiserror::Error)]
#[error("cannot draw curves.png: {0}")]
pub struct CurvesError(String);

fn failed(error: impl Display) -> CurvesError {
    CurvesError(error.to_string())
}

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;
type Points = Vec<(f64, f64)>;

/// The data to draw: a copy, so that drawing can run in another thread while the run continues.
pub struct Curves {
    run: String,
    fid: Option<Fid>,
    losses: Option<Losses>,
}

impl Curves {
    /// The curves of a run so far.
    #[must_use]
    pub fn new(run: &str, metrics: &Metrics) -> Self {
        Self { run: run.to_owned(), fid: Fid::of(metrics), losses: Losses::of(metrics) }
    }

    /// Draws them as PNG; `None` while there is nothing to draw. Takes some tenths of a second.
    ///
    /// # Errors
    /// When the drawing library or the encoder fails.
    pub fn draw(&self) -> Result<Option<Vec<u8>>, CurvesError> {
        let ends = self.losses.iter().map(|l| l.end).chain(self.fid.iter().map(|f| f.end));
        let last_image = ends.fold(0.0, f64::max);
        if last_image == 0.0 {
            return Ok(None);
        }
        register_built_in_font()?;
        let (width, height) = (SIZE.0 * SCALE, SIZE.1 * SCALE);
        let mut pixels = vec![255; (width * height * 3) as usize];
        {
            let root = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
            self.draw_on(&root, 0.0..last_image * 1.02)?;
            root.present().map_err(failed)?;
        }
        let large =
            RgbImage::from_raw(width, height, pixels).ok_or_else(|| failed("the picture is incomplete"))?;
        let mut png = Cursor::new(Vec::new());
        imageops::thumbnail(&large, SIZE.0, SIZE.1).write_to(&mut png, ImageFormat::Png).map_err(failed)?;
        Ok(Some(png.into_inner()))
    }

    fn draw_on(&self, root: &Area<'_>, images: Range<f64>) -> Result<(), CurvesError> {
        let header_height = 52;
        let (header, body) = root.split_vertically(px(header_height));
        text(&header, &self.run, (px(24), px(20)), 26, &TEXT)?;
        match (&self.fid, &self.losses) {
            (Some(fid), Some(losses)) => {
                let (above, below) = body.split_vertically(px((SIZE.1 - header_height) / 2));
                fid.draw(&above, images.clone())?;
                losses.draw(&below, images)
            }
            (Some(fid), None) => fid.draw(&body, images),
            (None, Some(losses)) => losses.draw(&body, images),
            (None, None) => Ok(()),
        }
    }
}

fn register_built_in_font() -> Result<(), CurvesError> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let register = || register_font(FONT, FontStyle::Normal, ttf_noto_sans::REGULAR).is_ok();
    if *REGISTERED.get_or_init(register) { Ok(()) } else { Err(failed("the built-in font is damaged")) }
}

/// The upper panel.
struct Fid {
    student: Points,
    teacher: Option<f64>,
    end: f64,
}

impl Fid {
    fn of(metrics: &Metrics) -> Option<Self> {
        let drawable = |fid: f64| fid.is_finite() && fid > 0.0;
        let student: Points = metrics
            .evaluations(Subject::Student)
            .filter_map(|e| Some((e.images as f64, e.scores.fid?)))
            .filter(|(_, fid)| drawable(*fid))
            .collect();
        let end = student.last()?.0;
        let teacher = metrics.evaluations(Subject::Teacher).next_back().and_then(|e| e.scores.fid);
        Some(Self { student, teacher: teacher.filter(|fid| drawable(*fid)), end })
    }

    fn draw(&self, area: &Area<'_>, images: Range<f64>) -> Result<(), CurvesError> {
        let values = self.student.iter().map(|p| p.1).chain(self.teacher);
        let low = values.clone().fold(f64::INFINITY, f64::min) / 1.25;
        let high = values.fold(0.0, f64::max) * 1.25;

        let mut legend = vec![];
        if let Some((_, fid)) = self.student.last() {
            legend.push(Entry {
                color: STUDENT,
                dashed: false,
                text: format!("student, now {}", short(*fid)),
            });
        }
        if let Some(fid) = self.teacher {
            legend.push(Entry { color: TEACHER, dashed: true, text: format!("teacher, {}", short(fid)) });
        }
        let chart = panel(area, "FID, logarithmic (lower is better)", &legend)?;
        let mut chart = ChartBuilder::on(&chart)
            .x_label_area_size(px(56))
            .y_label_area_size(px(72))
            .margin_right(px(72))
            .build_cartesian_2d(Axis::linear(&images), Axis::logarithmic(&(low..high)))
            .map_err(failed)?;
        let mut mesh = chart.configure_mesh();
        style_mesh(&mut mesh).draw().map_err(failed)?;

        if let Some(fid) = self.teacher {
            let line = [(images.start, fid.ln()), (images.end, fid.ln())];
            chart.draw_series(DashedLineSeries::new(line, px(10), px(7), stroke(TEACHER))).map_err(failed)?;
        }
        let student = self.student.iter().map(|(x, fid)| (*x, fid.ln())).collect();
        chart.draw_series(segments(&student, STUDENT)).map_err(failed)?;
        chart.draw_series(joints(&student, STUDENT)).map_err(failed)?;
        Ok(())
    }
}

/// The lower panel: two losses of unlike size, each with an axis of its own.
struct Losses {
    fake_score: Points,
    generator: Points,
    end: f64,
}

impl Losses {
    fn of(metrics: &Metrics) -> Option<Self> {
        let points = |loss: fn(&super::metrics::Training) -> f64| -> Points {
            let all = metrics.training().map(|t| (t.images as f64, loss(t)));
            all.filter(|(_, loss)| loss.is_finite()).collect()
        };
        let (fake_score, generator) = (points(|t| t.fake_score_loss), points(|t| t.generator_loss));
        let end = fake_score.last()?.0.max(generator.last()?.0);
        Some(Self { fake_score, generator, end })
    }

    fn draw(&self, area: &Area<'_>, images: Range<f64>) -> Result<(), CurvesError> {
        let legend = [
            Entry { color: FAKE_SCORE, dashed: false, text: "fake score (left axis)".into() },
            Entry { color: GENERATOR, dashed: false, text: "generator (right axis)".into() },
        ];
        let chart = panel(area, "Loss per sample", &legend)?;
        let (left, right) = (span(&self.fake_score), span(&self.generator));
        let mut chart = ChartBuilder::on(&chart)
            .x_label_area_size(px(56))
            .y_label_area_size(px(72))
            .right_y_label_area_size(px(72))
            .build_cartesian_2d(Axis::linear(&images), Axis::linear(&left))
            .map_err(failed)?
            .set_secondary_coord(Axis::linear(&images), Axis::linear(&right));
        let mut mesh = chart.configure_mesh();
        style_mesh(&mut mesh).y_label_style(font(17, &FAKE_SCORE)).draw().map_err(failed)?;
        chart
            .configure_secondary_axes()
            .axis_style(AXIS.stroke_width(SCALE))
            .set_all_tick_mark_size(px(5))
            .label_style(font(17, &GENERATOR))
            .draw()
            .map_err(failed)?;

        let within = |points: &Points, range: &Range<f64>| -> Points {
            thinned(points).into_iter().map(|(x, y)| (x, y.clamp(range.start, range.end))).collect()
        };
        let fake_score = within(&self.fake_score, &left);
        chart.draw_series(segments(&fake_score, FAKE_SCORE)).map_err(failed)?;
        chart.draw_series(joints(&fake_score, FAKE_SCORE)).map_err(failed)?;
        let generator = within(&self.generator, &right);
        chart.draw_secondary_series(segments(&generator, GENERATOR)).map_err(failed)?;
        chart.draw_secondary_series(joints(&generator, GENERATOR)).map_err(failed)?;
        Ok(())
    }
}

/// The segments of a line. (The library's own line series draws long spikes where a dense line turns sharply.)
fn segments(points: &Points, color: RGBColor) -> impl Iterator<Item = PathElement<(f64, f64)>> {
    points.windows(2).map(move |pair| PathElement::new(pair.to_vec(), stroke(color)))
}

/// The joints of a line; larger dots while they are few, so that a single one is seen.
fn joints(points: &Points, color: RGBColor) -> impl Iterator<Item = Circle<(f64, f64), i32>> {
    let radius = if points.len() <= 30 { px(5) } else { stroke(color).stroke_width as i32 / 2 };
    points.iter().map(move |point| Circle::new(*point, radius, color.filled()))
}

/// At most some hundred points: means over as many adjacent points as needed.
fn thinned(points: &Points) -> Points {
    let group = points.len().div_ceil(400).max(1);
    let mean = |chunk: &[(f64, f64)]| {
        let sum = chunk.iter().fold((0.0, 0.0), |sum, p| (sum.0 + p.0, sum.1 + p.1));
        (sum.0 / chunk.len() as f64, sum.1 / chunk.len() as f64)
    };
    points.chunks(group).map(mean).collect()
}

/// One entry of a legend. Legends stand above their panel, where no curve can overlap them.
struct Entry {
    color: RGBColor,
    dashed: bool,
    text: String,
}

/// Writes the heading and the legend, and returns the area below them.
fn panel<'a>(area: &Area<'a>, heading: &str, legend: &[Entry]) -> Result<Area<'a>, CurvesError> {
    let (top, chart) = area.split_vertically(px(46));
    let middle = px(22);
    text(&top, heading, (px(24), middle), 19, &TEXT)?;
    let mut right = top.dim_in_pixel().0 as i32 - px(72);
    for entry in legend.iter().rev() {
        let (width, _) = top.estimate_text_size(&entry.text, &font(17, &TEXT)).map_err(failed)?;
        right -= width as i32;
        text(&top, &entry.text, (right, middle), 17, &TEXT)?;
        right -= px(10);
        let start = right - px(34);
        let dashes = if entry.dashed { vec![(0, 8), (13, 21), (26, 34)] } else { vec![(0, 34)] };
        for (from, to) in dashes {
            let dash = [(start + px(from), middle), (start + px(to), middle)];
            top.draw(&PathElement::new(dash, stroke(entry.color))).map_err(failed)?;
        }
        right = start - px(26);
    }
    Ok(chart)
}

fn text(
    area: &Area<'_>,
    words: &str,
    at: (i32, i32),
    size: u32,
    color: &RGBColor,
) -> Result<(), CurvesError> {
    let anchor = text_anchor::Pos::new(text_anchor::HPos::Left, text_anchor::VPos::Center);
    area.draw(&Text::new(words.to_owned(), at, font(size, color).pos(anchor))).map_err(failed)
}

type Mesh<'a, 'b, DB> = plotters::chart::MeshStyle<'a, 'b, Axis, Axis, DB>;

fn style_mesh<'m, 'a, 'b, DB: DrawingBackend>(mesh: &'m mut Mesh<'a, 'b, DB>) -> &'m mut Mesh<'a, 'b, DB> {
    mesh.disable_x_mesh()
        .bold_line_style(GRID.stroke_width(SCALE))
        .light_line_style(TRANSPARENT)
        .axis_style(AXIS.stroke_width(SCALE))
        .set_all_tick_mark_size(px(5))
        .label_style(font(17, &TEXT))
        .x_desc("images seen")
        .axis_desc_style(font(17, &TEXT))
}

fn font<'a>(size: u32, color: &'a RGBColor) -> TextStyle<'a> {
    (FONT, px(size)).into_font().color(color)
}

fn stroke(color: RGBColor) -> ShapeStyle {
    color.stroke_width(5 * SCALE / 2)
}

/// Logical pixels as drawn pixels.
fn px(pixels: u32) -> i32 {
    (pixels * SCALE) as i32
}

/// An axis whose marks are chosen here, not by the library.
struct Axis {
    line: RangedCoordf64,
    marks: Vec<f64>,
    label: fn(f64) -> String,
}

impl Axis {
    fn linear(range: &Range<f64>) -> Self {
        Self { line: range.clone().into(), marks: linear_ticks(range), label: short }
    }

    /// For logarithms of values in `range`, labeled with the values.
    fn logarithmic(range: &Range<f64>) -> Self {
        Self {
            line: (range.start.ln()..range.end.ln()).into(),
            marks: log_ticks(range).into_iter().map(f64::ln).collect(),
            label: |logarithm| short(logarithm.exp()),
        }
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        self.line.map(value, limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.marks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.line.range()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        (self.label)(*value)
    }
}

/// The range of most of the points: a few outliers, such as the first windows of a run, are left out.
fn span(points: &Points) -> Range<f64> {
    let mut values: Vec<f64> = points.iter().map(|p| p.1).collect();
    values.sort_by(f64::total_cmp);
    let quantile = |q: f64| values[((values.len() - 1) as f64 * q).round() as usize];
    let (low, high) = (quantile(0.02), quantile(0.98));
    let margin = ((high - low) * 0.12).max(high.abs() * 0.02).max(1e-9);
    low - margin..high + margin
}

/// About six round numbers: multiples of 1, 2 or 5 times a power of ten.
fn linear_ticks(range: &Range<f64>) -> Vec<f64> {
    let rough = (range.end - range.start) / 6.0;
    let magnitude = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * magnitude).into_iter().find(|s| *s >= rough);
    let step = step.unwrap_or(magnitude * 10.0);
    let first = (range.start / step).ceil() as i64;
    let last = (range.end / step).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

/// 1, 2 and 5 of each decade; only the decades themselves when there are many.
fn log_ticks(range: &Range<f64>) -> Vec<f64> {
    let decades = range.start.log10().floor() as i32..=range.end.log10().ceil() as i32;
    let multiples: &[f64] = if decades.clone().count() > 5 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    decades
        .flat_map(|d| multiples.iter().map(move |m| m * 10_f64.powi(d)))
        .filter(|tick| range.contains(tick))
        .collect()
}

#[cfg(test)]
mod tests {
    use potstill_proto::scores::Subject::{Student, Teacher};

    use super::*;
    use crate::monitor::fixtures::{evaluation, spec, totals};

    /// A typical run: FID falls from 300 to near the teacher's.
    fn run(iterations: u64) -> Metrics {
        let mut metrics = Metrics::new(&spec(iterations));
        metrics.evaluation(&evaluation(Teacher, 0, 3.1), 0.0);
        metrics.evaluation(&evaluation(Student, 0, 290.0), 0.0);
        for i in 0..iterations {
            metrics.iteration(totals(i), 0.0);
            if (i + 1) % 100 == 0 {
                let progress = (i + 1) as f64 / 220.0;
                let fid = 4.2 + 285.0 * (-progress * 1.6).exp() * (1.0 + 0.1 * (i as f64).sin());
                metrics.evaluation(&evaluation(Student, i + 1, fid), 0.0);
            }
        }
        metrics
    }

    fn decode(png: &[u8]) -> RgbImage {
        image::load_from_memory(png).unwrap().to_rgb8()
    }

    #[test]
    fn both_panels_are_drawn() {
        let picture = decode(&Curves::new("digits-20260101-120000", &run(1200)).draw().unwrap().unwrap());
        assert_eq!(picture.dimensions(), SIZE);
        for color in [STUDENT, TEACHER, FAKE_SCORE, GENERATOR] {
            let of_color = picture.pixels().filter(|p| p.0 == [color.0, color.1, color.2]).count();
            assert!(of_color > 200, "{color:?}: {of_color} pixels");
        }
    }

    #[test]
    fn without_evaluations_only_the_losses_are_drawn() {
        let mut metrics = Metrics::new(&spec(200));
        for i in 0..200 {
            metrics.iteration(totals(i), 0.0);
        }
        let picture = decode(&Curves::new("r", &metrics).draw().unwrap().unwrap());
        assert!(picture.pixels().any(|p| p.0 == [FAKE_SCORE.0, FAKE_SCORE.1, FAKE_SCORE.2]));
        assert!(!picture.pixels().any(|p| p.0 == [STUDENT.0, STUDENT.1, STUDENT.2]));
    }

    #[test]
    fn nothing_measured_nothing_drawn() {
        assert!(Curves::new("r", &Metrics::new(&spec(200))).draw().unwrap().is_none());
    }

    #[test]
    fn odd_values_do_not_stop_the_drawing() {
        let mut metrics = Metrics::new(&spec(10));
        for i in 0..10 {
            metrics.iteration(
                potstill_core::observation::IterationTotals { generator_loss: f64::NAN, ..totals(i) },
                0.0,
            );
        }
        metrics.evaluation(&evaluation(Student, 10, f64::NAN), 0.0);
        assert!(Curves::new("r", &metrics).draw().unwrap().is_none());
        metrics.evaluation(&evaluation(Student, 10, 7.0), 0.0);
        assert!(Curves::new("r", &metrics).draw().unwrap().is_some());
    }

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!(linear_ticks(&(0.0..1020.0)), [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0]);
        assert_eq!(linear_ticks(&(-120.0..80.0)), [-100.0, -50.0, 0.0, 50.0]);
        assert_eq!(log_ticks(&(2.5..300.0)), [5.0, 10.0, 20.0, 50.0, 100.0, 200.0]);
    }
}
